"""A model of which one layer at a time is in memory: transformers' own code over one layer.

The backbone keeps its forward (masks, positions, RoPE) and gets a list of layers that holds one,
with the parts before and behind it replaced by identities; so a state that goes through the
layers one by one sees the arithmetic of the whole module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from buildsys.formats.tensors import row_parts
from buildsys.models.computing import HERE, Compute, back
from buildsys.models.freed_memory import give_back
from buildsys.models.open import Model
from buildsys.models.runtime import empty, fill, position_ids, skeleton, stored_name

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.samples import Sample

Kind = Literal["patches", "block", "merger", "embedding", "layer", "head"]


@dataclass(frozen=True)
class Stage:
    """One step of the way through the model. name: the classic name of its module; weights: how
    many numbers a token (in the vision tower a patch) is multiplied with."""

    name: str
    kind: Kind
    index: int
    weights: int

    @property
    def vision(self) -> bool:
        return self.kind in ("patches", "block", "merger")


class Ungrouped(nn.Module):
    """In place of the merger: the patches [n, width] that it would merge, side by side."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self._unit = unit

    def forward(self, state: Tensor) -> Tensor:
        return state.reshape(len(state) // self._unit, -1)


class LayerwiseModel:
    """A skeleton of the model, and `tensors` (classic names) to fill one part of it from."""

    def __init__(self, model: Model, tensors: TensorSource, compute: Compute = HERE) -> None:
        self.family = model.family
        self.tensors = tensors
        self.compute = compute
        self._model = model
        self._module: Any = skeleton(model, tensors)
        compute.buffers_there(self._module)
        backbone: Any = self._module.model
        self._visual: Any = getattr(backbone, "visual", None)
        language: Any = backbone if self._visual is None else backbone.language_model
        self._language = language
        self._layers: list[nn.Module] = list(language.layers)
        # Which kind of mask each layer takes, where the family has several.
        self._kinds: list[str] = list(getattr(language.config, "layer_types", None) or ())
        self._norm: nn.Module = language.norm
        language.norm = nn.Identity()
        self._blocks: list[nn.Module] = []
        if self._visual is not None:
            self._blocks = list(self._visual.blocks)
            self._patches, self._merger = self._visual.patch_embed, self._visual.merger
            self._visual.patch_embed = nn.Identity()
            self._visual.merger = Ungrouped(self._visual.spatial_merge_size**2)
            # Qwen2.5-VL's blocks that look at the whole image; the others see windows.
            self._wide: list[int] = list(getattr(self._visual, "fullatt_block_indexes", ()))

    def stages(self, *, images: bool) -> list[Stage]:
        """Every stage in order; those of the vision tower only where samples have images."""
        found = []
        if images:
            found.append(self._stage("visual.patch_embed", "patches"))
            for index in range(len(self._blocks)):
                found.append(self._stage(f"visual.blocks.{index}", "block", index))
            found.append(self._stage("visual.merger", "merger"))
        found.append(Stage("model.embed_tokens", "embedding", 0, 0))
        for index in range(len(self._layers)):
            found.append(self._stage(f"model.layers.{index}", "layer", index))
        return [*found, self._stage("lm_head", "head")]

    def _stage(self, name: str, kind: Kind, index: int = 0) -> Stage:
        linears = self.family.linears.values()
        own = [each for each in linears if f"{each.name}.".startswith(f"{name}.")]
        return Stage(name, kind, index, sum(torch.Size(each.shape).numel() for each in own))

    def light(self, sample: Sample) -> Sample:
        """The sample without its pixels, which only the first stage reads."""
        return replace(sample, pixel_values=None)

    @contextmanager
    def filled(self, stage: Stage) -> Iterator[nn.Module]:
        """The stage's module with its weights, for as long as the context lasts."""
        part = self._part(stage)
        name = "model.norm" if stage.kind == "head" else stage.name
        fill(part, name, self.tensors, self.family, self.compute)
        give_back()
        try:
            yield part
        finally:
            empty(part)
            give_back()

    def _part(self, stage: Stage) -> nn.Module:
        if stage.kind == "layer":
            return self._layers[stage.index]
        if stage.kind == "block":
            return self._blocks[stage.index]
        parts = {"patches": "_patches", "merger": "_merger", "head": "_norm"}
        part: nn.Module = getattr(self, parts[stage.kind])
        return part

    def run(self, stage: Stage, sample: Sample, state: Tensor) -> Tensor:
        """The state [rows, width] behind a filled stage, float32. Of the first vision stage the
        state is the sample's pixels; of the head's the result is its input, after the norm."""
        return back(self.run_there(stage, sample, state))

    @torch.inference_mode()
    def run_there(self, stage: Stage, sample: Sample, state: Tensor) -> Tensor:
        """`run`, with the result where and as it was computed."""
        part: Any = self._part(stage)
        state = self.compute.there(state)
        if stage.kind == "layer":
            return self._run_layer(stage.index, sample, state)
        if stage.kind == "block":
            self._visual.blocks = nn.ModuleList([part])
            self._visual.fullatt_block_indexes = [0] if stage.index in self._wide else []
            assert sample.image_grid_thw is not None
            seen = self._visual(state, grid_thw=self.compute.there(sample.image_grid_thw))
            # Behind the merger, where windows are in the image's order again.
            found: Tensor = seen.pooler_output.reshape(state.shape)
            return found
        ran: Tensor = part(state)
        return ran

    def positions(self, sample: Sample) -> Tensor:
        """The position ids that layers run with: [1, n] or [3, 1, n]."""
        return position_ids(self._module, sample)

    def _run_layer(self, index: int, sample: Sample, state: Tensor) -> Tensor:
        self._language.layers = nn.ModuleList([self._layers[index]])
        config = copy.copy(self._language.config)
        config.num_hidden_layers = 1
        if self._kinds:
            config.layer_types = [self._kinds[index]]
        self._language.config = config
        found: Tensor = self._language(
            inputs_embeds=state[None],
            position_ids=self.compute.there(position_ids(self._module, sample)),
            use_cache=False,
        ).last_hidden_state[0]
        return found

    @torch.inference_mode()
    def embeddings(
        self, samples: list[Sample], images: Iterator[Tensor] | None
    ) -> Iterator[Tensor]:
        """The first layer's input of every sample: rows of the embedding, of which only those
        that occur are held, with the image's merged tokens in their places."""
        used, table = self._used_rows(samples)
        for sample in samples:
            state = table[torch.searchsorted(used, sample.input_ids[0])]
            features = None if images is None else next(images)
            if features is not None and len(features):
                state[sample.input_ids[0] == self._model.config.image_token_id] = features
            yield state

    def _used_rows(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """The token ids that occur, ascending, and their rows of the embedding."""
        name = self.family.embedding.weight_name
        every = torch.cat([sample.input_ids[0] for sample in samples])
        used = torch.from_numpy(np.unique(every.numpy()))
        table = torch.empty(len(used), self.family.embedding.columns)
        shape = self.tensors.shape(name)
        for start, stop in row_parts(shape, torch.float32.itemsize):
            chosen = (used >= start) & (used < stop)
            if bool(chosen.any()):
                rows = self.tensors.rows(name, start, stop)
                table[chosen] = rows[used[chosen] - start].to(torch.float32)
                self.tensors.release(name)  # its pages, which a table of 150,000 rows has many of
        return used, table

    def head_parts(self, limit: int) -> Iterator[Tensor]:
        """The head's weight in parts [rows, in] of about `limit` bytes as float32."""
        name = stored_name(self.family.head.weight_name, set(self.tensors.names()), self.family)
        shape = self.tensors.shape(name)
        for start, stop in row_parts(shape, torch.float32.itemsize, limit):
            yield self.compute.there(self.tensors.rows(name, start, stop))
            self.tensors.release(name)
            give_back()
