"""What an int8 checkpoint needs of mllm's runtime, and what rule `int8-checkpoint` says of it.

Which layers have a shadow op is written in mllm's C++ configs; a checkpoint that needs another
is refused, and what the runtime will suffer is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError

if TYPE_CHECKING:
    from buildsys.models.family import Family
    from buildsys.models.int8_state import LinearScales
    from buildsys.models.open import Model
    from buildsys.models.rotations import Rotations
    from buildsys.rules.spec import StepContext

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


def target_of(step: StepContext, family: Family) -> str:
    """The numeric profile of the language model."""
    sees = any(linear.tower == "vision" for linear in family.linears.values())
    return str(step.options["target"] or ("mllm-v1-vl" if sees else "mllm-v1-text"))


def tell_shadow_layers(
    step: StepContext,
    family: Family,
    scales: Mapping[str, LinearScales],
    search: Mapping[str, Any] | None = None,
) -> None:
    """Write shadow_layers.json, warn of the layers in it, and hold them to `runtime_config`.

    search: what a search for a quality tried; it is written beside them.
    """
    loose = [name for name, both in scales.items() if not (both.input.clip and both.output.clip)]
    linears = [family.linears[name] for name in loose if family.linears[name].quantized]
    layers = sorted(
        each.layer for each in linears if each.kind == "down" and each.layer is not None
    )
    content: dict[str, Any] = {
        "target": target_of(step, family),
        "t01m_clip_threshold": step.options["t01m_clip_threshold"],
        "shadow_layers": layers,
        "no_clip_input": [name for name in loose if not scales[name].input.clip],
        "no_clip_output": [name for name in loose if not scales[name].output.clip],
    }
    if search is not None:
        content["quality"] = {"variant": step.name, **search}
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


def tell_runtime(
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
