"""Statistics of a model that is never in memory whole: layers outside, samples inside.

All samples go through one layer before the next is read. Memory: one layer, one sample, the
running statistics of one layer; the hidden states of all samples are on disk. The figures are
those of `profile`; only the head's mean and std are summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from buildsys.models.computing import HERE, Compute
from buildsys.models.layer_states import StageWriter, States, StateStore
from buildsys.models.layerwise import LayerwiseModel, Stage
from buildsys.models.profile import (
    LinearStatistics,
    Observers,
    Progress,
    hooked,
    linears_in,
    see_logits,
    sizes_of,
)
from buildsys.quant.observers import Mode, Statistics

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.graph.profile import GraphProfile
    from buildsys.models.open import Model
    from buildsys.models.samples import Sample, Samples

# The key of the graphs' ranges among the results, which are linears' names otherwise.
RANGES = "ranges"
# Bytes of the head's weight that are in memory at a time.
HEAD_PART = 1 << 24


def profile_layers(
    model: Model,
    tensors: TensorSource,
    samples: Sequence[Samples],
    folder: Path,
    *,
    mode: Mode = "absmax",
    no_bias: bool = True,
    graphs: GraphProfile | None = None,
    compute: Compute = HERE,
    progress: Progress = lambda done, total, unit: None,
) -> dict[str, LinearStatistics]:
    """Statistics of every linear that the samples reach, in order of first execution.

    tensors: classic names, as of `rotated_tensors`. folder: holds the hidden states (float32
    [tokens, hidden], twice while a layer runs) and what a killed run needs to go on; what is
    left there by a run with the same arguments is taken up. graphs: takes the ranges of the
    graphs' tensors in the same pass, in float32 on the CPU. compute: where the layers run;
    statistics are summed in float32 and float64 wherever that is. progress counts layers, by work.
    """
    sizes = sizes_of(samples)
    layerwise = LayerwiseModel(model, tensors, compute)
    store = StateStore(folder)
    stages = layerwise.stages(images=sizes.patches > 0)
    if graphs is not None:
        graphs.restore(store.results.get(RANGES, {}))
    work = _Work(stages, sizes.patches, sizes.tokens, progress)
    light: list[Sample] = []
    if stages[0].name in store.finished or not stages[0].vision:
        light = [layerwise.light(sample) for part in samples for sample in part]
    for stage in stages:
        if stage.name not in store.finished:
            observers = Observers(model.family, mode, no_bias, sizes)
            with store.stage(stage.name) as writer:
                told = work.of(stage)
                if stage.kind == "patches":
                    light = list(_run_patches(layerwise, stage, samples, writer, graphs, told))
                else:
                    _run(layerwise, stage, light, store.states, writer, observers, graphs, told)
                for name, both in observers.results().items():
                    writer.results[name] = asdict(both)
                if graphs is not None:
                    graphs.finish()
                    writer.results[RANGES] = dict(graphs.ranges)
        work.finish(stage)
    linears = {name: found for name, found in store.results.items() if name != RANGES}
    return _in_order(linears, images_first=light[0].image_grid_thw is not None)


def _run_patches(
    layerwise: LayerwiseModel,
    stage: Stage,
    samples: Sequence[Samples],
    writer: StageWriter,
    graphs: GraphProfile | None,
    told: Callable[[float], None],
) -> Iterator[Sample]:
    """Pixels to patches; yields the samples without their pixels."""
    with layerwise.filled(stage):
        for sample in (sample for part in samples for sample in part):
            state = torch.empty(0, 1)
            if sample.pixel_values is not None:
                state = layerwise.run(stage, sample, sample.pixel_values)
                if graphs is not None:
                    graphs.see(stage, sample, None, sample.pixel_values)
            writer.append(state)
            told(len(state))
            yield layerwise.light(sample)


def _run(
    layerwise: LayerwiseModel,
    stage: Stage,
    samples: list[Sample],
    states: States | None,
    writer: StageWriter,
    observers: Observers,
    graphs: GraphProfile | None,
    told: Callable[[float], None],
) -> None:
    """All samples through one stage."""
    if stage.kind == "embedding":
        if graphs is not None:
            graphs.see_embeddings()
        images = None if states is None else iter(states)
        for state in layerwise.embeddings(samples, images):
            writer.append(state)
        return
    assert states is not None
    if stage.kind == "head":
        _run_head(layerwise, stage, states, samples, observers, graphs, told)
        return
    with (
        layerwise.filled(stage) as part,
        hooked(linears_in(part, stage.name, layerwise.family), observers),
    ):
        for sample, state in zip(samples, states, strict=True):
            after = layerwise.run(stage, sample, state) if len(state) else state
            if graphs is not None and len(state):
                positions = layerwise.positions(sample) if stage.kind == "layer" else None
                graphs.see(stage, sample, positions, state)
            writer.append(after)
            told(len(state))


def _run_head(
    layerwise: LayerwiseModel,
    stage: Stage,
    states: States,
    samples: list[Sample],
    observers: Observers,
    graphs: GraphProfile | None,
    told: Callable[[float], None],
) -> None:
    """The head in parts of its rows; each part sees all samples."""
    head = layerwise.family.head
    with layerwise.filled(stage):
        for number, weight in enumerate(layerwise.head_parts(HEAD_PART)):
            for sample, state in zip(samples, states, strict=True):
                hidden = layerwise.run_there(stage, sample, state)
                if number == 0:
                    observers.see_input(head, hidden)
                    if graphs is not None:
                        graphs.see(stage, sample, None, state)
                see_logits(observers, weight, hidden, None if graphs is None else graphs.see_logits)
                told(len(hidden) * len(weight) / head.shape[0])


class _Work:
    """Progress in layers, each as large as its share of the multiplications."""

    def __init__(self, stages: list[Stage], patches: int, tokens: int, progress: Progress) -> None:
        self._rows = {True: patches, False: tokens}
        self._total = sum(self._rows[stage.vision] * stage.weights for stage in stages)
        self._stages = len(stages)
        self._progress = progress
        self._done = 0.0

    def of(self, stage: Stage) -> Callable[[float], None]:
        """told(rows): so many tokens or patches more are through the stage."""
        seen = 0.0

        def told(rows: float) -> None:
            nonlocal seen
            seen += rows
            self._tell(self._done + seen * stage.weights)

        return told

    def finish(self, stage: Stage) -> None:
        self._done += self._rows[stage.vision] * stage.weights
        self._tell(self._done)

    def _tell(self, done: float) -> None:
        self._progress(self._stages * min(done / self._total, 1.0), self._stages, "layers")


def _in_order(results: Mapping[str, Any], *, images_first: bool) -> dict[str, LinearStatistics]:
    """The order of first execution, sample by sample: a first sample without an image reaches
    the head before any reaches the vision tower."""
    names = sorted(results, key=lambda name: name.startswith("visual.") != images_first)
    return {
        name: LinearStatistics(
            Statistics(**results[name]["input"]), Statistics(**results[name]["output"])
        )
        for name in names
    }
