"""Rule `int8-checkpoint`: the state dict that mllm's NPU model is made from, and what its
runtime must be told: the layers that need a shadow on the CPU.

mllm's runtime reads the clip flags in its shadow op only, and which layers have one is written
in its C++ configs. A threshold that selects layers there is nothing to repair them with ruins
the model, so `clip: all` is the default and `runtime_config` is checked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.int8_ladder import Choice, Rung, rungs, search
from buildsys.rules.int8_runtime import (
    RUNTIME_CONFIGS,
    target_of,
    tell_runtime,
    tell_shadow_layers,
)
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
    asked = {
        "bias_correction": step.options.get("bias_correction"),
        "weight_scale": step.options.get("weight_scale") == "search",
    }
    for option, given in asked.items():
        if given and not gptq:
            yield Problem(
                f"{option} needs rounding: gptq",
                remedy="It is measured in the same pass over the samples.",
                option=option,
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
            "Which layers are left unclipped, for a shadow to repair, and what a search for a "
            "quality tried, as JSON.",
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
            "are `samples`; up to `shadow` shadow layers. What was tried is in the metadata and in "
            "shadow_layers.json, from where rule evaluate takes it.",
        },
        "rounding": {
            "enum": ["nearest", "gptq"],
            "default": "nearest",
            "description": "gptq: weights of the language model are rounded so that the error of "
            "one makes up for that of others, on `samples`; format and scales stay the same.",
        },
        "weight_scale": {
            "enum": ["absmax", "search"],
            "default": "absmax",
            "description": "search: a weight's scale is the one below its maximum that loses least "
            "on what the linear reads (with gptq).",
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
    resumable=True,
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
        with _states_folder(step) as folder:
            rounded = _rounded(step, model, tensors, layout, folder) if rung.gptq else None
            write_int8(out, tensors, names, layout, rounded, step.progress)

    choice = _make_rung(step, model, bool(file.clipped), write)
    scales = scales_of(choice.rung)
    tell_shadow_layers(step, family, scales, choice.search)
    tell_runtime(step, model, rotations, scales)


def _make_rung(
    step: StepContext, model: Model, clipped: bool, write: Callable[[Rung, Path], None]
) -> Choice:
    """Write what the options say, or what the search for a quality finds; and say what it was."""
    gptq, shadow = step.options["rounding"] == "gptq", step.options["shadow"]
    if step.options["quality"] is None:
        rung = Rung(True, gptq, shadow)
        write(rung, step.out)
        return Choice(rung)
    ladder = list(rungs(clipped=clipped, gptq=bool(step.inputs.get("samples")), shadow=shadow))
    return search(step, model, ladder, write, target_of(step, model.family))


def _rounded(
    step: StepContext, model: Model, tensors: TensorSource, layout: Int8Layout, folder: Path
) -> Callable[[str], Rounded | None]:
    """Linear -> its weight rounded by GPTQ; layers are made as they are asked for, in order."""
    from buildsys.models.hessian_memory import check_limit, limit_of
    from buildsys.models.rounded import rounded_by_name
    from buildsys.rules.activation_scales import open_step_samples

    limit = limit_of(model.family, step.memory)
    check_limit(model.family, layout.quantized, limit)
    return rounded_by_name(
        model,
        tensors,
        open_step_samples(step, model),
        folder,
        ranges=layout.ranges(),
        target=target_of(step, model.family),
        damping=step.options["damping"],
        correct_bias=layout.correct_bias,
        search_scale=step.options["weight_scale"] == "search",
        limit=limit,
    )


@contextmanager
def _states_folder(step: StepContext) -> Iterator[Path]:
    """Where GPTQ keeps its layers: over a kill, where the engine can. A search for a quality
    makes several, each in a folder of its own."""
    if step.kept is not None and step.options["quality"] is None:
        yield step.kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


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
