"""Plans with just what a rule's check looks at."""

from __future__ import annotations

from typing import Any

from buildsys.errors import Location
from buildsys.plan.graph import Plan, Ref, Step

HERE = Location("recipe.yaml", 1, 1)


def plan_of(
    name: str, rule: str, *others: Step, options: dict[str, Any] | None = None, **inputs: str
) -> tuple[Step, Plan]:
    """A step and the plan that it stands in beside `others`; inputs are artifacts of `others`
    where one has that name, else sources."""
    made = {other.name for other in others}
    step = Step(
        name=name,
        rule=rule,
        inputs={
            key: (Ref("artifact" if value in made else "source", value),)
            for key, value in inputs.items()
        },
        options=options or {},
        outputs={"out": name},
        optional=False,
        temporary=False,
        tags=(),
        threads=1,
        resources={},
        timeout=None,
        toolchain=None,
        environment={},
        where=HERE,
    )
    steps = {each.name: each for each in (*others, step)}
    producer = {each: each for each in steps}
    return step, Plan("test", "recipe.yaml", {}, {}, steps, producer, (), {})
