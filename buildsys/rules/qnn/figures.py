"""How near a compiled graph comes to our simulation of it and to the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from buildsys.rules.qnn.probes import Run

Outputs = dict[str, Tensor]


def graph_figures(
    runs: Sequence[Run], emulated: Sequence[Outputs], simulated: Sequence[Outputs]
) -> dict[str, object]:
    """Cosine and signal-to-quantization-noise (dB) of the emulator's outputs, against our
    simulation and against float: the worst of all outputs, and each by name.

    `..._noise_db` is the same SQNR with the other sign, for gates, which hold upper limits.
    """
    outputs: dict[str, dict[str, float]] = {}
    for name in runs[0].expected:
        emulator = _all(runs, name, emulated)
        of = {
            "simulation": _all(runs, name, simulated),
            "fp32": _all(runs, name, [dict(run.expected) for run in runs]),
        }
        outputs[name] = {
            f"{against}_{figure}": value
            for against, reference in of.items()
            for figure, value in _both(reference, emulator).items()
        }
        simulation = _both(of["fp32"], of["simulation"])
        outputs[name]["simulation_to_fp32_sqnr"] = simulation["sqnr"]
    worst: dict[str, object] = {
        figure: min(each[figure] for each in outputs.values())
        for figure in next(iter(outputs.values()))
    }
    for against in ("simulation", "fp32"):
        sqnr = worst[f"{against}_sqnr"]
        assert isinstance(sqnr, float)
        worst[f"{against}_noise_db"] = -sqnr
    return {**worst, "outputs": outputs}


def _all(runs: Sequence[Run], name: str, outputs: Sequence[Outputs]) -> Tensor:
    """One output of all runs, without padding, as one vector in float64."""
    parts = [run.valid(name, out[name]) for run, out in zip(runs, outputs, strict=True)]
    return torch.cat([part.double().flatten() for part in parts])


def _both(reference: Tensor, x: Tensor) -> dict[str, float]:
    signal, noise = float(reference.square().sum()), float((reference - x).square().sum())
    product = signal * float(x.square().sum())
    cosine = float((reference * x).sum()) / math.sqrt(product) if product else float(noise == 0)
    sqnr = 10 * math.log10(signal / noise) if signal and noise else math.inf if not noise else 0.0
    return {"cosine": cosine, "sqnr": sqnr}
