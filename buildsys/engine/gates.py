"""Gates: limits on figures that an evaluation has committed.

They are in no action key: a gate that is changed is read again and nothing is rebuilt. What
came out is kept for deploy.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.folder import BuildFolder, read_json, write_json
from buildsys.errors import RecipeError

if TYPE_CHECKING:
    from buildsys.engine.staleness import Verdict
    from buildsys.plan.graph import Gate, Json, Plan


class Reading(NamedTuple):
    """A gate and the figure that it found."""

    gate: Gate
    value: float

    @property
    def passed(self) -> bool:
        return self.value <= self.gate.limit  # not so for NaN

    def __str__(self) -> str:
        sign, word = ("<=", "holds") if self.passed else (">", "fails")
        gate = self.gate
        return f"gate {word}: {gate.artifact} {gate.figure} = {self.value:g} {sign} {gate.limit:g}"


def ready_gates(plan: Plan, verdicts: Mapping[str, Verdict]) -> list[Gate]:
    """The gates on artifacts that are fresh and there."""
    ready = []
    for gate in plan.gates:
        verdict = verdicts.get(plan.producer[gate.artifact])
        if verdict is not None and verdict.state == "fresh" and not verdict.absent:
            ready.append(gate)
    return ready


def read_gates(gates: Iterable[Gate], folder: BuildFolder) -> list[Reading]:
    """Look every figure up in its artifact, which must be there.

    Raises RecipeError, at the gate's place, where the artifact has no such figure.
    """
    contents: dict[str, Json] = {}
    readings = []
    for gate in gates:
        if gate.artifact not in contents:
            contents[gate.artifact] = _content(gate, folder)
        readings.append(Reading(gate, figure(gate, contents[gate.artifact])))
    return readings


def _content(gate: Gate, folder: BuildFolder) -> Json:
    try:
        with open(f"{folder.root}/{gate.artifact}", "rb") as file:
            return json.load(file)
    except (ValueError, IsADirectoryError) as error:
        message = f"a gate needs figures, and {gate.artifact} is no JSON file"
        raise RecipeError(message, location=gate.where) from error


def figure(gate: Gate, content: Json) -> float:
    """The figure that a gate names: "int8.pth exact_match_drop" is
    content["variants"]["int8.pth"]["exact_match_drop"]; without such a variant, a path of keys
    from the top."""
    variants = content.get("variants", {}) if isinstance(content, dict) else {}
    variant, _, last = gate.figure.rpartition(" ")
    words = [variant, last] if variant in variants else gate.figure.split(" ")
    value: Json = variants if variant in variants else content
    for word in words:
        value = value.get(word) if isinstance(value, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise RecipeError(
        f"{gate.artifact} has no figure '{gate.figure}'",
        remedy=f"it has: {', '.join(known_figures(variants)) or 'none'}",
        location=gate.where,
    )


def known_figures(variants: Json) -> list[str]:
    """What gates of this artifact could be called."""
    return [
        f"{variant} {name}"
        for variant, figures in variants.items()
        if isinstance(figures, dict)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def keep_readings(readings: Iterable[Reading], folder: BuildFolder) -> None:
    """Write down what came out, for deploy; not where the disk takes nothing."""
    rows = [
        {
            "artifact": each.gate.artifact,
            "figure": each.gate.figure,
            "limit": each.gate.limit,
            "value": each.value if math.isfinite(each.value) else str(each.value),
            "passed": each.passed,
        }
        for each in readings
    ]
    if read_json(folder.own("gates")) != rows:
        with contextlib.suppress(OSError):
            write_json(folder.own("gates"), rows)
