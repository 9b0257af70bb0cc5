"""The activation scales file: mllm's JSON, and a section of ours that says what it was made with.

mllm's keys: "ori" (maximum) and "top_0_1" (order statistic at 0.999 n), each linear -> {"input",
"output"}; "all_stat", linear -> {"input", "output"} -> {"mean", "std"}. mllm's tools look at no
other key, so "qbuild", "ranges" (tensor of the graphs -> [min, max]) and "clipped" (linear ->
{"input", "output"}: ranges below the maximum, where they were asked for; of a down_proj also
"shadow" with "input", "output" and "gain") can stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.formats.config_file import read_json
from buildsys.models.errors import ModelError

if TYPE_CHECKING:
    from buildsys.models.clipped import Clipped
    from buildsys.models.profile import LinearStatistics

REMEDY = "Give a scales file made by rule activation-scales or by mllm's get_distribution.py."


@dataclass(frozen=True)
class Side:
    """One side of a linear: the largest value and the order statistic, as magnitudes; and the
    range to clip at, where one was chosen."""

    ori: float
    top_0_1: float
    clipped: float | None = None


@dataclass(frozen=True)
class ShadowRanges:
    """Ranges of a down_proj in a shadow layer; gain: what the shadow is worth."""

    input: float
    output: float
    gain: float


@dataclass(frozen=True)
class Scales:
    """Linear -> (input, output), in the file's order. made_with: its "qbuild" section, empty
    for a file of mllm's own. ranges: tensor of a graph -> (min, max), where they were taken.
    shadows: down_proj -> its ranges in a shadow layer, where they were chosen."""

    sides: Mapping[str, tuple[Side, Side]]
    made_with: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shadows: Mapping[str, ShadowRanges] = field(default_factory=dict)

    @property
    def clipped(self) -> bool:
        """Does the file choose ranges below the maximum?"""
        return any(side.clipped is not None for both in self.sides.values() for side in both)


def write_scales(
    path: str | PathLike[str],
    statistics: Mapping[str, LinearStatistics],
    made_with: Mapping[str, Any],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    clipped: Mapping[str, Clipped] | None = None,
) -> None:
    """Write the statistics as mllm writes them (indent 4), with `made_with` under "qbuild", the
    graphs' ranges under "ranges" and clipped ones under "clipped", where there are any."""
    content: dict[str, Any] = {
        key: {
            name: {"input": getattr(both.input, key), "output": getattr(both.output, key)}
            for name, both in statistics.items()
        }
        for key in ("ori", "top_0_1")
    }
    content["all_stat"] = {
        name: {
            "input": {"mean": both.input.mean, "std": both.input.std},
            "output": {"mean": both.output.mean, "std": both.output.std},
        }
        for name, both in statistics.items()
    }
    if ranges is not None:
        content["ranges"] = {name: list(ends) for name, ends in ranges.items()}
    if clipped:
        content["clipped"] = {
            name: {key: value for key, value in asdict(both).items() if value is not None}
            for name, both in clipped.items()
        }
    content["qbuild"] = dict(made_with)
    text = json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text, encoding="utf-8")


def read_scales(path: str | PathLike[str]) -> Scales:
    """Read a scales file of qbuild's or mllm's. Raises FormatError, or ModelError naming the
    linear whose entry is missing or no finite number."""
    content = read_json(Path(path))
    if not isinstance(content, dict) or not isinstance(content.get("ori"), dict):
        raise ModelError("is missing", file=path, field="ori", remedy=REMEDY)
    sides = {
        name: (_side(content, name, "input", path), _side(content, name, "output", path))
        for name in content["ori"]
    }
    made_with = content.get("qbuild")
    ranges = {name: _ends(name, ends, path) for name, ends in content.get("ranges", {}).items()}
    shadows = {
        name: _shadow(name, both["shadow"], path)
        for name, both in content.get("clipped", {}).items()
        if "shadow" in both
    }
    return Scales(sides, made_with if isinstance(made_with, dict) else {}, ranges, shadows)


def _shadow(name: str, content: Any, path: str | PathLike[str]) -> ShadowRanges:
    values = [content.get(key) for key in ("input", "output", "gain")]
    if not (all(map(_is_finite, values)) and values[0] > 0 and values[1] > 0):
        message = f"its shadow ranges are {content!r}, not positive numbers"
        raise ModelError(message, file=path, tensor=name, remedy=REMEDY)
    return ShadowRanges(*map(float, values))


def _ends(name: str, ends: Any, path: str | PathLike[str]) -> tuple[float, float]:
    if isinstance(ends, list) and len(ends) == 2 and all(map(_is_finite, ends)):
        return float(ends[0]), float(ends[1])
    message = f"its range is {ends!r}, not two finite numbers"
    raise ModelError(message, file=path, tensor=name, remedy=REMEDY)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _side(content: Any, name: str, side: str, path: str | PathLike[str]) -> Side:
    values = []
    for key in ("ori", "top_0_1"):
        value = content.get(key, {}).get(name, {}).get(side)
        if not _is_finite(value):
            message = f"{key} of its {side} is {value!r}, not a finite number"
            raise ModelError(message, file=path, tensor=name, remedy=REMEDY)
        values.append(float(value))
    clipped = content.get("clipped", {}).get(name, {}).get(side)
    if clipped is not None and not (_is_finite(clipped) and clipped > 0):
        message = f"the clipped range of its {side} is {clipped!r}, not a positive number"
        raise ModelError(message, file=path, tensor=name, remedy=REMEDY)
    largest, top = values
    return Side(largest, top, clipped)
