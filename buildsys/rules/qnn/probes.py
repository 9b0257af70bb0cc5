"""Samples that go through the graphs three ways: in float, in the emulator, and simulated.

Every graph is given the float model's own states, quantized, so that a graph's figures are of
this graph alone; a wrong one is seen where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.models.graph.evaluate import evaluate
from buildsys.models.graph.inputs import language_angles, vision_angles
from buildsys.models.graph.language import (
    COS,
    MASK,
    SIN,
    cache_names,
    past_names,
)
from buildsys.rules.qnn.pieces import language_piece, vision_piece

if TYPE_CHECKING:
    from buildsys.models.graph.graph import Graph
    from buildsys.models.graph.quantized import ReadWeight
    from buildsys.models.layerwise import LayerwiseModel
    from buildsys.models.samples import Sample
    from buildsys.rules.qnn.pieces import Cut, Piece

MASKED = -1e4  # in float; a compiled graph's mask goes as deep as its encoding


@dataclass(frozen=True)
class Run:
    """One run of a graph: its inputs, and what the float model has at the outputs. rows: of each
    output, how many count: the rest is padding."""

    feeds: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    rows: Mapping[str, int]

    def valid(self, name: str, x: Tensor) -> Tensor:
        """The rows of an output that count; rows are the last axis but one."""
        return x[..., : self.rows[name], :]


@dataclass
class LanguageProbe:
    """A sample's state between two graphs of the language model: hidden [n, hidden]."""

    hidden: Tensor
    cos: Tensor
    sin: Tensor

    def runs(self, piece: Piece, cut: Cut, read: ReadWeight) -> list[Run]:
        """The runs of a piece, chunk by chunk, with the keys and values of earlier chunks; the
        state then is what the piece leaves."""
        count = len(self.hidden)
        whole = language_piece(cut, piece.name, piece.layers, chunk=count, past=0)
        mask = torch.full((count, count), MASKED).triu(1)
        feeds = {whole.inputs[0]: self.hidden, COS: self.cos, SIN: self.sin, MASK: mask}
        made = evaluate(whole, feeds, read)
        runs = [self._chunk(piece, whole, made, start, cut) for start in range(0, count, cut.chunk)]
        self.hidden = made[whole.outputs[-1]]
        return runs

    def _chunk(
        self, piece: Piece, whole: Graph, made: Mapping[str, Tensor], start: int, cut: Cut
    ) -> Run:
        chunk, past = cut.chunk, cut.past
        part = slice(start, start + chunk)
        rows = len(self.hidden[part])
        feeds = {
            whole.inputs[0]: _padded(self.hidden[part], chunk),
            COS: _padded(self.cos[part], chunk),
            SIN: _padded(self.sin[part], chunk),
            MASK: chunk_mask(chunk, past, start),
        }
        if past:
            for layer in piece.layers:
                for mine, earlier in zip(cache_names(layer), past_names(layer), strict=True):
                    feeds[earlier] = _padded(made[mine][:, :start], past)
        expected = {name: made[name][..., part, :] for name in whole.outputs}
        return Run(feeds, expected, dict.fromkeys(whole.outputs, rows))


def chunk_mask(chunk: int, past: int, before: int) -> Tensor:
    """[chunk, past + chunk]: a token sees the first `before` of the past, and its chunk up to
    itself."""
    columns = torch.arange(past + chunk)
    rows = torch.arange(chunk)[:, None]
    seen = (columns < before) | ((columns >= past) & (columns - past <= rows))
    return torch.where(seen, 0.0, MASKED)


@dataclass
class VisionProbe:
    """An image's state between two graphs of the vision encoder: [patches, width]."""

    hidden: Tensor
    grid: Tensor

    def runs(self, piece: Piece, cut: Cut, read: ReadWeight) -> list[Run]:
        """The one run of a piece; the state then is what the piece leaves. Raises ModelError
        for an image that has more patches than the graph."""
        count, patches = len(self.hidden), cut.patches
        whole = vision_piece(cut, piece.name, piece.layers, patches=count)
        cos, sin, mask = vision_angles(cut.model.config, self.grid, patches)
        state, (output,) = whole.inputs[0], whole.outputs
        exact = {COS: cos[:count], SIN: sin[:count], MASK: mask[:count, :count] * MASKED}
        made = evaluate(whole, {state: self.hidden, **exact}, read)
        feeds = {state: _padded(self.hidden, patches), COS: cos, SIN: sin, MASK: mask * MASKED}
        self.hidden = made[output]
        return [Run(feeds, made, {output: len(self.hidden)})]


Probe = LanguageProbe | VisionProbe


def vision_probes(samples: Sequence[Sample]) -> list[VisionProbe]:
    """One probe for every sample with images."""
    return [
        VisionProbe(sample.pixel_values, sample.image_grid_thw)
        for sample in samples
        if sample.pixel_values is not None and sample.image_grid_thw is not None
    ]


def language_probes(
    cut: Cut, layerwise: LayerwiseModel, samples: Sequence[Sample], images: Iterator[Tensor] | None
) -> Iterator[LanguageProbe]:
    """One probe for every sample, of as many tokens as the graphs take. images: of every sample
    its merged tokens, or none [0, hidden]."""
    light = [layerwise.light(sample) for sample in samples]
    length = cut.past + cut.chunk
    for sample, hidden in zip(light, layerwise.embeddings(light, images), strict=True):
        cos, sin = language_angles(cut.model.config, layerwise.positions(sample))
        yield LanguageProbe(hidden[:length], cos[:length], sin[:length])


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros behind, so that its last axis but one has so many."""
    return functional.pad(x, (0, 0, 0, rows - x.shape[-2]))
