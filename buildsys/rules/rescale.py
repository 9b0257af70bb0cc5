"""Rule `rescale`: factors that move outliers of up_proj's outputs into down_proj's weights.

Exact in real numbers (SwiGLU is linear in up) and, with powers of two, in floating point. It
repairs what neither rotation nor fusion reaches: static int8 at gate, up and down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import ROTATION, digest_of, model_input, open_inputs
from buildsys.rules.spec import Problem, Rule, StepContext

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Step


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """The rotation must be this model's."""
    yield from same_inputs(step, plan, "rotation", ["model"])


RULE = Rule(
    name="rescale",
    doc="Exact rescaling factors of up_proj's rows against down_proj's columns.",
    inputs={"model": model_input("config", "weights"), "rotation": ROTATION},
    options={
        "pairs": {
            "enum": ["up-down"],
            "default": "up-down",
            "description": "Which linears are balanced against each other.",
        },
        "powers_of_two": {
            "type": "boolean",
            "default": True,
            "description": "Round the factors to powers of two, which are exact in every float.",
        },
    },
    distributions=("torch",),
    worker="python",
    check=check,
)


def make(step: StepContext) -> None:
    """Balance every layer of the rotated model."""
    from buildsys.models.rescaling import balance_up_down, save_rescaling
    from buildsys.models.rotated import rotated_tensors

    model, rotations, _ = open_inputs(step)
    factors = balance_up_down(
        model.family,
        rotated_tensors(model, rotations),
        powers_of_two=step.options["powers_of_two"],
        progress=step.progress,
    )
    metadata = {"qbuild.rotation": digest_of(step, "rotation") or "none"}
    save_rescaling(step.out, model.family, factors, metadata)
