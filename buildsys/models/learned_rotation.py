"""Learned rotation: R1 and every layer's R2 go downhill on what static quantization costs.

The loss is the mean KL of the quantized model to the float one, on calibration windows. Weights
do not change; the gradient reaches the rotations alone, which stay orthogonal (`quant.cayley`).
Source: SpinQuant (Liu et al. 2024, arXiv 2405.16406), whose quantizers have no static ranges:
here the range is part of the gradient, for under one scale per tensor it is what costs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from buildsys.models.errors import ModelError
from buildsys.models.turned_language import FloatRun, TurnedLanguage, Turns, kl_and_gradient
from buildsys.quant.cayley import CayleyDescent, nearest_orthogonal

if TYPE_CHECKING:
    from buildsys.formats.rotation_file import Rotation
    from buildsys.models.open import Model
    from buildsys.models.samples import Samples

STATE = "learned.pt"
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Learning:
    """How a rotation is learned.

    steps: Cayley steps. rate: how far the first step turns (radians, root mean square over the
    axes); it falls linearly to 0. batch: samples per step. weights: they are int8, rounded to
    the nearest, while learning; false where GPTQ will round them. target: the runtime's profile.
    seed: of the order of the samples.
    """

    steps: int
    rate: float
    batch: int
    weights: bool
    target: str
    seed: int


@dataclass(frozen=True)
class Learned:
    """The rotation, and the KL (nats) of all samples under the one it started from and under
    itself. losses: the KL of every step's batch, before the step."""

    rotation: Rotation
    before: float
    after: float
    losses: tuple[float, ...]


def learn_rotation(
    model: Model,
    start: Rotation,
    samples: Sequence[Samples],
    how: Learning,
    *,
    folder: Path | None = None,
    progress: Progress = lambda done, total, unit: None,
) -> Learned:
    """The rotation that `start` becomes; the vision tower's matrices stay. float64, orthogonal
    to rounding; `start` itself where the samples lose more under what was learned.

    folder: keeps the state of the last step; what a killed run with the same arguments left
    there is taken up. Raises ModelError naming a sample of one token, QuantError where a
    gradient is not finite. Memory: up to six times the model in float32 (of SmolLM2 measured).
    """
    every = [each for part in samples for each in part]
    for sample in every:
        if sample.input_ids.shape[1] < 2:
            raise ModelError(
                f"{sample.origin}: is one token, of which nothing is predicted",
                remedy="Learn on windows of two tokens and more; 256 are good.",
            )
    language = TurnedLanguage(model, how.target, every, rounds=how.weights)
    descent = _Descent(start, how, folder)
    while descent.steps < how.steps:
        progress(descent.steps, how.steps, "steps")
        descent.step(language, _batch(language.runs, descent.steps, how))
    progress(how.steps, how.steps, "steps")
    learned = descent.rotation(start)
    before, after = (_loss(language, rotation) for rotation in (start, learned))
    kept = replace(learned, metadata=_told(start, how)) if after < before else start
    return Learned(kept, before, after, tuple(descent.losses))


def _told(start: Rotation, how: Learning) -> dict[str, Any]:
    """The file says how its matrices were learned, beside what they started from."""
    return {**start.metadata, "learned": asdict(how)}


def _batch(runs: Sequence[FloatRun], step: int, how: Learning) -> list[FloatRun]:
    """The samples of one step: all of them in a random order, then again in another."""
    found = []
    for place in range(step * how.batch, (step + 1) * how.batch):
        epoch, index = divmod(place, len(runs))
        generator = torch.Generator().manual_seed(how.seed + (epoch << 32))
        order = torch.randperm(len(runs), generator=generator)
        found.append(runs[int(order[index])])
    return found


class _Descent:
    """The rotations of one run and what is kept of them between steps."""

    def __init__(self, start: Rotation, how: Learning, folder: Path | None) -> None:
        self.losses: list[float] = []
        self._how = how
        self._place = None if folder is None else folder / STATE
        self._R1 = CayleyDescent(start.R[None])
        self._R2 = CayleyDescent(torch.stack(start.R_v))
        if self._place is not None and self._place.exists():
            kept: dict[str, Any] = torch.load(self._place, weights_only=True)
            self.losses = kept["losses"]
            self._R1.restore(kept["R1"])
            self._R2.restore(kept["R2"])

    @property
    def steps(self) -> int:
        return len(self.losses)

    def step(self, language: TurnedLanguage, batch: Sequence[FloatRun]) -> None:
        """One step down, on the mean loss of a batch."""
        R1, R2 = self._R1.matrices[0], self._R2.matrices
        turns = Turns(R1.to(torch.float32), R2.to(torch.float32))
        for leaf in (turns.R1, turns.R2):
            leaf.requires_grad_()
        language.turn(turns)
        loss = 0.0
        for run in batch:
            state = language.run(turns, run)
            kl, gradient = kl_and_gradient(language.head, state.detach(), run.final)
            torch.autograd.backward(state, gradient / len(batch))
            loss += kl / len(batch)
        language.collect()
        angle = self._how.rate * (1 - self.steps / self._how.steps)
        for descent, leaf in ((self._R1, turns.R1), (self._R2, turns.R2)):
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            descent.step(gradient.reshape(descent.matrices.shape), angle)
        self.losses.append(loss)
        self._keep()

    def rotation(self, start: Rotation) -> Rotation:
        """The matrices as they are now, in the place of the start's."""
        return replace(
            start,
            R=nearest_orthogonal(self._R1.matrices[0]),
            R_v=tuple(nearest_orthogonal(self._R2.matrices)),
        )

    def _keep(self) -> None:
        if self._place is None:
            return
        content = {"losses": self.losses, "R1": self._R1.state(), "R2": self._R2.state()}
        draft = self._place.with_suffix(".draft")
        with draft.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self._place)


@torch.no_grad()
def _loss(language: TurnedLanguage, rotation: Rotation) -> float:
    """The mean KL of all samples."""
    turns = Turns(rotation.R, torch.stack(rotation.R_v))
    language.turn(turns)
    losses = [
        kl_and_gradient(language.head, language.run(turns, run), run.final)[0]
        for run in language.runs
    ]
    return sum(losses) / len(losses)
