"""Plan-time checks that artifacts which must be made with the same inputs are.

mllm's tools cannot tell that scales were taken with another rotation than the weights were
turned with; here the plan knows what every artifact is made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from buildsys.rules.spec import Problem

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Ref, Step


def same_inputs(step: Step, plan: Plan, via: str, names: Sequence[str]) -> Iterator[Problem]:
    """Where an artifact given as input `via` was made with other `names` than this step's own.

    Sources given as `via` are taken as they are: nothing is known of their making.
    """
    for ref in step.inputs.get(via, ()):
        maker = _maker(ref, plan)
        if maker is None:
            continue
        for name in names:
            mine, its = _given(step, name), _given(maker, name)
            if mine != its:
                yield Problem(
                    f"{ref.name} is made with {name} {_told(its)}, this one with {_told(mine)}",
                    remedy=f"Give both the same {name}.",
                    input=via,
                )


def _maker(ref: Ref, plan: Plan) -> Step | None:
    if ref.kind != "artifact" or ref.name not in plan.producer:
        return None
    return plan.steps[plan.producer[ref.name]]


def _given(step: Step, name: str) -> tuple[str, ...]:
    return tuple(ref.name for ref in step.inputs.get(name, ()))


def _told(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names) if names else "none"
