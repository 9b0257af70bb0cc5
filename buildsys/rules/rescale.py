"""Rule `rescale`: factors that move outliers from one linear of a layer into the next.

Exact in real numbers (SwiGLU is linear in up, attention in v, and scores in q and k) and, with
powers of two, in floating point. It repairs what neither rotation nor fusion reaches: static
int8 at up, down and o, and one scale for all rows of a weight. gate-up alone is not exact: it
trades a small change of a few rows for a smaller range, and is taken up by int8 only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import ROTATION, digest_of, model_input, open_inputs
from buildsys.rules.spec import InputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.formats.tensors import TensorSource
    from buildsys.models.open import Model
    from buildsys.plan.graph import Plan, Step


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """The rotation must be this model's."""
    yield from same_inputs(step, plan, "rotation", ["model"])
    if step.options.get("by") == "activations" and not step.inputs.get("samples"):
        yield Problem(
            "by: activations needs `samples`",
            remedy="Give the text and images that the scales are taken on.",
            option="by",
        )
    if "gate-up" in step.options.get("pairs", ()) and step.options.get("by") == "weights":
        yield Problem(
            "gate-up is chosen by what the two linears write",
            remedy="Say `by: activations`, with `samples`.",
            option="pairs",
        )


RULE = Rule(
    name="rescale",
    doc="Rescaling factors: up against down, v against o, q against k, gate against up.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "rotation": ROTATION,
        "samples": InputSpec(
            "Text and images to balance by; without `by: activations` they are not read.",
            kinds=("text", "images"),
            many=True,
            required=False,
        ),
    },
    options={
        "pairs": {
            "type": "array",
            "items": {"enum": ["up-down", "v-o", "q-k", "gate-up"]},
            "uniqueItems": True,
            "minItems": 1,
            "default": ["up-down"],
            "description": "Which linears are balanced against each other: rows of the first are "
            "divided, columns of the second multiplied (of q-k: rows of k and of q). gate-up: the "
            "few rows of gate that reach furthest are divided and those of up multiplied, which is "
            "close to exact; what computes in float, or in 4-bit weights, leaves it out.",
        },
        "by": {
            "enum": ["weights", "activations"],
            "default": "weights",
            "description": "weights: both sides get equal maxima. activations: least noise of all "
            "quantizers between the two, on `samples`.",
        },
        "target": {
            "enum": ["mllm-v1-text", "mllm-v1-vl", None],
            "default": None,
            "description": "The runtime's profile, for `by: activations`; by default mllm-v1-vl "
            "for models with a vision tower, else mllm-v1-text.",
        },
        "powers_of_two": {
            "type": "boolean",
            "default": True,
            "description": "Round the factors to powers of two, which are exact in every float.",
        },
    },
    distributions=("torch", "transformers", "tokenizers", "pillow"),
    worker="python",
    threads=2,
    float_sums=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Balance every layer of the rotated model. Raises ModelError for a pair that this family
    cannot rescale, or naming a bad sample."""
    from buildsys.models.rescaling import balance_by_weights, check_pairs, save_rescaling
    from buildsys.models.rotated import rotated_tensors

    model, rotations, _ = open_inputs(step)
    tensors, pairs = rotated_tensors(model, rotations), step.options["pairs"]
    powers_of_two = step.options["powers_of_two"]
    check_pairs(model.family, pairs)
    metadata = {"qbuild.rotation": digest_of(step, "rotation") or "none"}
    with tempfile.TemporaryDirectory() as folder:
        if step.options["by"] == "weights":
            factors = balance_by_weights(
                model.family, tensors, pairs, powers_of_two=powers_of_two, progress=step.progress
            )
        else:
            factors = _by_activations(step, model, tensors, Path(folder))
        save_rescaling(step.out, model.family, pairs, factors, metadata)


def _by_activations(
    step: StepContext, model: Model, tensors: TensorSource, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    from buildsys.models.balanced import balance_by_activations
    from buildsys.models.samples import open_samples

    seen = model.config.vision is not None
    return balance_by_activations(
        model,
        tensors,
        [
            open_samples(model, given.kind, given.paths, given.options)
            for given in step.inputs["samples"]
        ],
        folder,
        step.options["pairs"],
        target=step.options["target"] or ("mllm-v1-vl" if seen else "mllm-v1-text"),
        powers_of_two=step.options["powers_of_two"],
        progress=step.progress,
    )
