"""What layer-by-layer runs keep between layers: the hidden states of all samples, on disk.

A file per stage, read and written sample by sample, so that they are in the page cache where
there is room and never in the process. A finished stage's file and its results are named in
`progress.json`, replaced in one step: a run that is killed goes on behind the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

PROGRESS = "progress.json"


@dataclass
class States:
    """float32 states [rows, width] of every sample, one after the other in one file."""

    path: Path
    shapes: list[tuple[int, int]] = field(default_factory=list)

    def read(self, index: int) -> Tensor:
        """The state of one sample."""
        rows, width = self.shapes[index]
        offset = sum(r * w for r, w in self.shapes[:index]) * torch.float32.itemsize
        values = np.fromfile(self.path, np.float32, rows * width, offset=offset)
        return torch.from_numpy(values.reshape(rows, width))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.read, range(len(self.shapes)))


class StateStore:
    """The states of the last finished stage, and what all finished stages gave.

    Invariant: `progress.json` names only files that are complete on disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.finished: list[str] = []
        self.results: dict[str, Any] = {}
        self.states: States | None = None
        self._resume()

    def _resume(self) -> None:
        place = self._folder / PROGRESS
        if not place.exists():
            return
        content = json.loads(place.read_text(encoding="utf-8"))
        self.finished, self.results = content["finished"], content["results"]
        if content["shapes"] is not None:
            shapes = [(rows, width) for rows, width in content["shapes"]]
            self.states = States(self._file(self.finished[-1]), shapes)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageWriter]:
        """Write a stage's states and results; without an error it is finished at the end."""
        with self._file(name).open("wb") as stream:
            writer = StageWriter(stream, States(self._file(name)))
            yield writer
            stream.flush()
            os.fsync(stream.fileno())
        before, self.states = self.states, writer.states
        self.finished.append(name)
        self.results.update(writer.results)
        self._save()
        if before is not None:
            before.path.unlink()

    def _save(self) -> None:
        content = {
            "finished": self.finished,
            "shapes": None if self.states is None else self.states.shapes,
            "results": self.results,
        }
        draft = self._folder / f"{PROGRESS}.draft"
        with draft.open("w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self._folder / PROGRESS)

    def _file(self, stage: str) -> Path:
        return self._folder / f"{stage}.states"


@dataclass
class StageWriter:
    """Takes the states of a stage, sample by sample, and its results (JSON values by name)."""

    stream: IO[bytes]
    states: States
    results: dict[str, Any] = field(default_factory=dict)

    def append(self, state: Tensor) -> None:
        """The next sample's state [rows, width]; a sample without one gives an empty tensor."""
        rows, width = state.shape
        state.to(torch.float32).contiguous().numpy().tofile(self.stream)
        self.states.shapes.append((rows, width))
