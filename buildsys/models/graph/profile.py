"""Ranges of every tensor of the graphs, taken layer by layer beside the linears' statistics.

The graphs run in float on the states that transformers' layers read, over norms that are folded,
as the compiled graphs have them. Any token may come, so the embeddings' range is that of the
whole table and of the images' tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from buildsys.formats.tensors import row_parts
from buildsys.models.graph.evaluate import evaluate
from buildsys.models.graph.graph import Graph
from buildsys.models.graph.inputs import language_angles, vision_angles
from buildsys.models.graph.language import (
    COS,
    EMBEDDINGS,
    MASK,
    SIN,
    final_graph,
    language_graph,
    layer_sizes,
)
from buildsys.models.graph.ranges import RangeObserver
from buildsys.models.graph.vision import vision_graph
from buildsys.models.graph.weights import LinearWeights

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.layerwise import Stage
    from buildsys.models.open import Model
    from buildsys.models.samples import Sample

# Deep enough for any softmax in float; its range is not observed.
MASKED = -1e4
HEAD = "lm_head"


class GraphProfile:
    """Running ranges of one model's graphs. One stage's weights are in memory at a time."""

    def __init__(self, model: Model, tensors: TensorSource) -> None:
        """tensors: classic names, every norm folded (`rotated_tensors` with fold_all)."""
        self._model = model
        self._tensors = tensors
        self._names = frozenset(tensors.names())
        self._weights = LinearWeights(tensors)
        self._sizes = layer_sizes(model.config)
        self._observer = RangeObserver()
        self._graph = lru_cache(maxsize=8)(self._build)

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """What was seen so far."""
        return self._observer.seen

    def restore(self, ranges: Mapping[str, Any]) -> None:
        """Take up what a killed run has seen."""
        self._observer.seen.update({name: (low, high) for name, (low, high) in ranges.items()})

    def see(self, stage: Stage, sample: Sample, positions: Tensor | None, state: Tensor) -> None:
        """Run a stage's graph on the state [rows, width] that the stage reads.

        positions: [1, n] or [3, 1, n] of the sample's tokens, for a layer.
        """
        graph = self._graph(stage.kind, stage.index, len(state))
        feeds = {graph.inputs[0]: state}
        if MASK in graph.inputs:
            feeds |= self._angles(stage, sample, positions, len(state))
        evaluate(graph, feeds, self._weights, self._observer.of(graph))

    def see_logits(self, logits: Tensor) -> None:
        """Some of the head's outputs, which no graph has."""
        self._observer.update(HEAD, logits)

    def see_embeddings(self) -> None:
        """The whole table."""
        name = self._model.family.embedding.weight_name
        for start, stop in row_parts(self._tensors.shape(name), torch.float32.itemsize):
            self._observer.update(EMBEDDINGS, self._tensors.rows(name, start, stop))
            self._tensors.release(name)

    def finish(self) -> None:
        """The stage is over: its weights go."""
        self._weights.clear()

    def _angles(
        self, stage: Stage, sample: Sample, positions: Tensor | None, rows: int
    ) -> dict[str, Tensor]:
        if stage.vision:
            assert sample.image_grid_thw is not None
            cos, sin, mask = vision_angles(self._model.config, sample.image_grid_thw, rows)
            return {COS: cos, SIN: sin, MASK: mask * MASKED}
        assert positions is not None
        cos, sin = language_angles(self._model.config, positions)
        return {COS: cos, SIN: sin, MASK: torch.full((rows, rows), MASKED).triu(1)}

    def _build(self, kind: str, index: int, rows: int) -> Graph:
        config = self._model.config
        if kind == "layer":
            return language_graph(kind, self._sizes, (index,), chunk=rows, past=0, final=False)
        if kind == "head":
            return final_graph(self._sizes, config.num_hidden_layers, rows)
        return vision_graph(
            kind,
            config,
            self._names,
            patches=rows,
            blocks=(index,) if kind == "block" else (),
            embed=kind == "patches",
            merger=kind == "merger",
        )
