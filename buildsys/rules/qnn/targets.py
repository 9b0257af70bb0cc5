"""The Snapdragons that contexts are compiled for, by QNN's own numbers of them.

Source: what the compiler writes into a binary for each number (checked in the tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """soc: Qualcomm's part number; model: QNN's number of it; arch: of its Hexagon."""

    soc: str
    model: int
    arch: int

    def provider_options(self) -> dict[str, str]:
        """As onnxruntime-qnn is told."""
        return {"htp_arch": str(self.arch), "soc_model": str(self.model)}


# The first of an arch is its default.
TARGETS: tuple[Target, ...] = (
    Target("SM8350", 30, 68),
    Target("SM8450", 36, 69),
    Target("SM8550", 43, 73),
    Target("SM8650", 57, 75),
    Target("SM8750", 69, 79),
    Target("SM8850", 87, 81),
)
BY_SOC: Mapping[str, Target] = {target.soc: target for target in TARGETS}
BY_ARCH: Mapping[int, Target] = {target.arch: target for target in TARGETS}


def target_of(arch: int, soc: str | None) -> Target | None:
    """The target of the options; None where the SoC has another arch."""
    if soc is None:
        return BY_ARCH[arch]
    target = BY_SOC[soc]
    return target if target.arch == arch else None
