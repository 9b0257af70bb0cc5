"""Rule `int8-checkpoint`: the state dict that mllm's NPU model is made from, and what its
runtime must be told: the layers that need a shadow on the CPU.

mllm's runtime reads the clip flags in its shadow op only, and which layers have one is written
in its C++ configs. A threshold that selects layers there is nothing to repair them with ruins
the model, so `clip: all` is the default and `runtime_config` is checked.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.int8_ladder import Rung, rungs, search
from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import RESCALE, ROTATION, digest_of, model_input, open_inputs
from buildsys.rules.spec import ANY_FILE, InputSpec, OutputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.family import Family
    from buildsys.models.int8_state import Int8Layout, LinearScales
    from buildsys.models.open import Model
    from buildsys.models.rotations import Rotations
    from buildsys.models.rounded import Rounded
    from buildsys.models.scales import Scales
    from buildsys.plan.graph import Plan, Step

# Layers whose down_proj has a shadow op, by the name of mllm v1's config (QWenNPUConfig).
RUNTIME_CONFIGS: Mapping[str, frozenset[int]] = {
    "1.8b": frozenset({1, 2, 26}),
    "1.5b": frozenset({1, 2, 4, 5, 26}),
    "1.5b-vl": frozenset({1, 26}),
    "1.8b-rotated": frozenset(),
    "1.5b-rotated": frozenset(),
    "1.5b-vl-rotated": frozenset(),
}
LARGEST_FP16 = 65504.0
SAMPLES_REMEDY = "Give the text and images that the scales were taken on."


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """Scales, rotation and factors belong together; a threshold is given where one is needed."""
    yield from same_inputs(step, plan, "rotation", ["model"])
    yield from same_inputs(step, plan, "rescale", ["model", "rotation"])
    yield from same_inputs(step, plan, "scales", ["model", "rotation", "rescale"])
    if step.options["clip"] == "threshold" and step.options["t01m_clip_threshold"] is None:
        yield Problem(
            "clip: threshold needs a t01m_clip_threshold",
            remedy="mllm's examples use 64; clip: all needs none.",
            option="clip",
        )
    if step.options.get("quality") and not step.inputs.get("text"):
        yield Problem(
            "quality needs `text` to be measured on",
            remedy="Give a text that the scales were not taken on.",
            option="quality",
        )
    gptq = step.options.get("rounding") == "gptq"
    if gptq and not step.inputs.get("samples"):
        yield Problem("rounding: gptq needs `samples`", remedy=SAMPLES_REMEDY, option="rounding")
    if step.options.get("bias_correction") and not gptq:
        yield Problem(
            "bias_correction needs rounding: gptq",
            remedy="It is measured in the same pass over the samples.",
            option="bias_correction",
        )


RULE = Rule(
    name="int8-checkpoint",
    doc="int8.pth for mllm's NPU runtime: int8 weights, static ranges and clip flags.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "rotation": ROTATION,
        "rescale": RESCALE,
        "scales": InputSpec(
            "Activation ranges, taken with the same model, rotation and factors.", kinds=ANY_FILE
        ),
        "samples": InputSpec(
            "Text and images that GPTQ takes the inputs of the linears from.",
            kinds=("text", "images"),
            many=True,
            required=False,
        ),
        "text": InputSpec(
            "Text that `quality` is measured on: not what the scales were taken on.",
            kinds=("text",),
            many=True,
            required=False,
        ),
    },
    outputs={
        "shadow_layers": OutputSpec(
            "Which layers are left unclipped, for a shadow to repair, as JSON.",
            "shadow_layers.json",
        )
    },
    options={
        "target": {
            "enum": ["mllm-v1-text", "mllm-v1-vl", None],
            "default": None,
            "description": "The runtime's numeric profile; by default mllm-v1-vl for models with "
            "a vision tower, else mllm-v1-text.",
        },
        "clip": {
            "enum": ["all", "threshold"],
            "default": "all",
            "description": "all: every range is the maximum. threshold: mllm's own selection of "
            "outlier layers, which its runtime must shadow.",
        },
        "t01m_clip_threshold": {
            "type": ["number", "null"],
            "exclusiveMinimum": 0,
            "default": None,
            "description": "mllm's threshold; implies clip: threshold.",
        },
        "shadow": {
            "type": "integer",
            "minimum": 0,
            "default": 0,
            "description": "At most so many layers get a shadow on the CPU that repairs their "
            "down_proj: those that it is worth most for, as the scales file's clipping measured.",
        },
        "quality": {
            "type": ["object", "null"],
            "properties": {
                "metric": {"enum": ["ppl"]},
                "within": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["metric", "within"],
            "additionalProperties": False,
            "default": None,
            "description": "Take the cheapest of these whose perplexity on `text` is within this "
            "share of fp32's: ranges at the maximum; the scales' clipped ranges; GPTQ, where there "
            "are `samples`; up to `shadow` shadow layers. What was tried is in the metadata.",
        },
        "rounding": {
            "enum": ["nearest", "gptq"],
            "default": "nearest",
            "description": "gptq: weights of the language model are rounded so that the error of "
            "one makes up for that of others, on `samples`; format and scales stay the same.",
        },
        "damping": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "default": 0.01,
            "description": "GPTQ's: this share of the mean diagonal is added to the Hessian.",
        },
        "bias_correction": {
            "type": "boolean",
            "default": False,
            "description": "Add what rounding takes from the mean output of q, k and v to their "
            "biases (with gptq).",
        },
        "quant_bias": {
            "type": "boolean",
            "default": False,
            "description": "Quantize biases to int32 (configs without rotation).",
        },
        "vision": {
            "type": "boolean",
            "default": True,
            "description": "Quantize the vision tower; false leaves it in float.",
        },
        "runtime_config": {
            "enum": [*RUNTIME_CONFIGS, None],
            "default": None,
            "description": "The mllm config that will run it: its shadow layers are checked.",
        },
    },
    distributions=("torch", "transformers", "tokenizers", "pillow"),
    worker="python",
    threads=2,
    float_sums=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Quantize. Raises ModelError naming a linear without a scale, StepError where scales and
    rotation do not belong together or the runtime would not shadow a layer that needs it."""
    from buildsys.models.int8_state import (
        Int8Layout,
        choose_scales,
        quantized_linears,
        shadowed,
        write_int8,
    )
    from buildsys.models.rotated import rotated_tensors
    from buildsys.models.scales import read_scales

    model, rotations, rescale = open_inputs(step)
    file = read_scales(step.one("scales").path)
    family = model.family
    _check_making(step, file, target_of(step, family))
    quantized = [linear.name for linear in quantized_linears(family, vision=step.options["vision"])]
    _refuse_unknown_tower(family, quantized)
    tensors = rotated_tensors(model, rotations, rescale=rescale)
    names = [name for name in tensors.names() if not _folded_away(name, family, rotations)]

    def scales_of(rung: Rung) -> dict[str, LinearScales]:
        threshold = step.options["t01m_clip_threshold"]
        chosen = choose_scales(family, file, quantized, threshold, clipped=rung.clipped)
        return shadowed(chosen, file, rung.shadow) if rung.shadow else chosen

    def write(rung: Rung, out: Path) -> None:
        correct = step.options["bias_correction"] and rung.gptq
        layout = Int8Layout(
            frozenset(quantized), scales_of(rung), step.options["quant_bias"], correct
        )
        with tempfile.TemporaryDirectory() as folder:
            rounded = _rounded(step, model, tensors, layout, Path(folder)) if rung.gptq else None
            write_int8(out, tensors, names, layout, rounded, step.progress)

    rung = _make_rung(step, model, bool(file.clipped), write)
    _tell_shadow_layers(step, family, scales_of(rung))
    _tell_runtime(step, model, rotations, scales_of(rung))


def _make_rung(
    step: StepContext, model: Model, clipped: bool, write: Callable[[Rung, Path], None]
) -> Rung:
    """Write what the options say, or what the search for a quality finds; and say what it was."""
    gptq, shadow = step.options["rounding"] == "gptq", step.options["shadow"]
    if step.options["quality"] is None:
        rung = Rung(True, gptq, shadow)
        write(rung, step.out)
        return rung
    ladder = list(rungs(clipped=clipped, gptq=bool(step.inputs.get("samples")), shadow=shadow))
    return search(step, model, ladder, write, target_of(step, model.family))


def _rounded(
    step: StepContext, model: Model, tensors: TensorSource, layout: Int8Layout, folder: Path
) -> Callable[[str], Rounded | None]:
    """Linear -> its weight rounded by GPTQ; layers are made as they are asked for, in order."""
    from buildsys.models.rounded import rounded_by_name
    from buildsys.rules.activation_scales import open_step_samples

    return rounded_by_name(
        model,
        tensors,
        open_step_samples(step, model),
        folder,
        ranges=layout.ranges(),
        target=target_of(step, model.family),
        damping=step.options["damping"],
        correct_bias=layout.correct_bias,
    )


def target_of(step: StepContext, family: Family) -> str:
    """The numeric profile of the language model."""
    sees = any(linear.tower == "vision" for linear in family.linears.values())
    return str(step.options["target"] or ("mllm-v1-vl" if sees else "mllm-v1-text"))


def _refuse_unknown_tower(family: Family, quantized: Sequence[str]) -> None:
    """StepError where no runtime has an int8 vision tower of this kind."""
    from buildsys.models.simulate import VISION_PROFILE
    from buildsys.quant.profiles import profile

    tower = (family.linears[name] for name in quantized)
    for linear in tower:
        if linear.tower == "vision" and profile(VISION_PROFILE).width(linear.name) is None:
            raise StepError(
                f"{linear.name}: profile {VISION_PROFILE} has no int8 linear of this kind",
                remedy="Set vision: false; the vision tower then stays in float.",
            )


def _check_making(step: StepContext, file: Scales, target: str) -> None:
    """Scales of qbuild's must have been taken with what this step is given."""
    if not file.made_with:
        step.warn("the scales do not say which rotation they were taken with: not checked")
        return
    for name in ("rotation", "rescale"):
        mine, its = digest_of(step, name), file.made_with.get(name)
        if mine != its:
            raise StepError(
                f"the scales were taken with {name} {_short(its)}, this step has {_short(mine)}",
                remedy="Take the scales anew with the same model, rotation and factors.",
            )
    clipped_for = file.made_with.get("target", target)
    if clipped_for != target:
        raise StepError(
            f"the scales were clipped for target {clipped_for}, this step has {target}",
            remedy="Give both the same target.",
        )
    if step.options["quant_bias"] and file.made_with.get("no_bias"):
        raise StepError(
            "quant_bias adds the bias before the output is quantized, and the scales were taken "
            "before the bias",
            remedy="Take the scales with no_bias: false.",
        )


def _short(digest: Any) -> str:
    return "none" if digest is None else str(digest)[:12]


def _folded_away(name: str, family: Family, rotations: Rotations | None) -> bool:
    """A turned vision tower runs under RMSNorm, and its LayerNorms' biases are zero: mllm's
    state dict has none."""
    norm = family.norms.get(name.removesuffix(".bias"))
    return (
        rotations is not None
        and norm is not None
        and norm.bias
        and rotations.turns(norm.tower)
        and name.endswith(".bias")
    )


def _tell_shadow_layers(
    step: StepContext, family: Family, scales: Mapping[str, LinearScales]
) -> None:
    """Write shadow_layers.json, warn of the layers in it, and hold them to `runtime_config`."""
    loose = [name for name, both in scales.items() if not (both.input.clip and both.output.clip)]
    linears = [family.linears[name] for name in loose if family.linears[name].quantized]
    layers = sorted(
        each.layer for each in linears if each.kind == "down" and each.layer is not None
    )
    content = {
        "target": target_of(step, family),
        "t01m_clip_threshold": step.options["t01m_clip_threshold"],
        "shadow_layers": layers,
        "no_clip_input": [name for name in loose if not scales[name].input.clip],
        "no_clip_output": [name for name in loose if not scales[name].output.clip],
    }
    text = json.dumps(content, indent=2) + "\n"
    step.outputs["shadow_layers"].write_text(text, encoding="utf-8")
    step.note("shadow_layers", layers)
    if not linears:
        return
    told = ", ".join(linear.name for linear in linears)
    step.warn(f"{len(linears)} linears are left unclipped, for shadow layers to repair: {told}")
    config = step.options["runtime_config"]
    if config is not None:
        shadowed = RUNTIME_CONFIGS[config]
        lost = [each.name for each in linears if each.kind != "down" or each.layer not in shadowed]
        if lost:
            raise StepError(
                f"config '{config}' of mllm does not shadow {', '.join(lost)}: values above their "
                "range would saturate unrepaired",
                remedy="Use clip: all, another threshold, or a config that shadows these layers.",
            )


def _tell_runtime(
    step: StepContext,
    model: Model,
    rotations: Rotations | None,
    scales: Mapping[str, LinearScales],
) -> None:
    """Say what the artifact needs of the runtime, and what it will suffer there."""
    target = target_of(step, model.family)
    step.note("target", target)
    if target == "mllm-v1-text":
        _warn_of_fp16(step, model.family, scales)
    if model.config.vision is None:
        return
    if step.options["vision"] and (rotations is None or not rotations.turns("vision")):
        step.warn(
            "mllm's NPU vision tower uses RMSNorm: one that is not turned needs LayerNorm and "
            "cannot run there; rotate with vision: true"
        )
    if rotations is not None:
        step.warn(
            "run it with a '-rotated' config of mllm, and decode with an untied one: the head of "
            "a rotated model is not its embedding"
        )


def _warn_of_fp16(step: StepContext, family: Family, scales: Mapping[str, LinearScales]) -> None:
    """The text runtime holds gate and up outputs, and their product, in float16."""
    gates = {each.layer: each.name for each in family.linears.values() if each.kind == "gate"}
    above = {}
    for up, _ in family.up_down_pairs:
        gate = gates[up.layer]
        if gate in scales and up.name in scales:
            product = scales[gate].output.magnitude * scales[up.name].output.magnitude
            if product > LARGEST_FP16:
                above[up.layer] = product
    if above:
        told = ", ".join(str(layer) for layer in above)
        step.warn(
            f"gate x up can reach {max(above.values()):.0f} in layers {told}; this runtime "
            f"multiplies them in float16, which ends at {LARGEST_FP16:.0f}"
        )
