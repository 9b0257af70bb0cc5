"""A model's tensors after norm fusion, rotation and rescaling, computed one by one.

Each tensor needs only itself, the norm that feeds it and small matrices, so a checkpoint of any
depth streams through: float64 in between, one rounding at the end.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from buildsys.formats.tensors import TensorSource
from buildsys.models.family import Embedding, Family, Linear, Norm
from buildsys.models.open import Model
from buildsys.models.rescaling import factors_of_linears
from buildsys.models.rotations import Rotations
from buildsys.models.transform import Transform

# Numbers of one tensor that are in float64 at a time, where it can be done in parts (8 MiB, and
# a few times that in between).
PART = 1 << 20
# A tensor that must be computed whole and is larger lies in a file that has no name, from which
# the system can take its pages back (a 7B's down_proj has 272 MB).
LARGEST_IN_MEMORY = 1 << 26


def rotated_tensors(
    model: Model,
    rotations: Rotations | None = None,
    *,
    fuse: bool = False,
    fold_all: bool = False,
    rescale: Mapping[str, Tensor] | None = None,
    parity: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorSource:
    """The model's tensors with classic names, lm_head always apart, as a source of `dtype`.

    rotations: None turns nothing. fuse: fold the norms even so (a rotation always does).
    rescale: name -> factors, as of `load_rescaling`, applied after the rotation.
    parity: round to float32 after each step, as mllm's tools do; by default for rotations that
        qbuild did not make.
    """
    of_mllm = rotations is not None and not rotations.of_qbuild
    transform = Transform(
        family=model.family,
        source=model.tensors,
        rotations=rotations,
        fuse=fuse or fold_all or rotations is not None,
        fold_all=fold_all,
        factors=factors_of_linears(rescale or {}, model.family),
        work=torch.float32 if (of_mllm if parity is None else parity) else torch.float64,
    )
    return RotatedTensors(transform, dtype)


class RotatedTensors:
    """A TensorSource over a transformed model; see `rotated_tensors`.

    Rows of tensors whose output side does not change are computed in parts. Any other tensor is
    computed whole and held until it is released: that one tensor is all the state. Where both
    sides change, one lies whole in between, in `work`.
    """

    def __init__(self, transform: Transform, dtype: torch.dtype) -> None:
        self.path = transform.source.path
        self.metadata: Mapping[str, object] = {}
        self._transform = transform
        self._dtype = dtype
        self._shapes = transform.family.shapes
        self._owners = dict(_owners(transform.family))
        self._stored = set(transform.source.names())
        self._names = [name for name in self._shapes if not self._is_dropped(name)]
        self._held: tuple[str, Tensor] | None = None

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def stored_type(self, name: str) -> str:
        return str(self._dtype).removeprefix("torch.")

    def nbytes(self, name: str) -> int:
        return torch.empty(self._shapes[name], dtype=self._dtype, device="meta").nbytes

    def read(self, name: str) -> Tensor:
        if self._held is None or self._held[0] != name:
            self._held = None
            self._held = (name, self._compute(name))
        return self._held[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        owner = self._owners[name]
        if self._in_rows(name, owner):
            start, stop, _ = slice(start, stop).indices(self._shapes[name][0])
            width = self._shapes[name][1]
            out = _room_for((max(0, stop - start), width), self._dtype)
            for part in _parts(len(out), width):
                out[part] = self._weight_rows(owner, start + part.start, start + part.stop)
            return out
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        if self._held is not None and self._held[0] == name:
            self._held = None
        read = {self._source_name(name)}
        owner = self._owners[name]
        if isinstance(owner, Linear) and name == owner.bias_name:
            read.add(owner.weight_name)  # through which the norm's bias was folded
        for each in read & self._stored:
            self._transform.source.release(each)

    def _is_dropped(self, name: str) -> bool:
        owner = self._owners[name]
        return isinstance(owner, Norm) and name.endswith(".bias") and self._transform.drops(owner)

    def _in_rows(self, name: str, owner: Embedding | Linear | Norm) -> bool:
        """Can any run of rows of this tensor be computed by itself?"""
        if isinstance(owner, Linear) and name == owner.weight_name:
            return not (owner.is_convolution or self._transform.changes_output(owner))
        return isinstance(owner, Embedding)

    def _compute(self, name: str) -> Tensor:
        owner, change = self._owners[name], self._transform
        if isinstance(owner, Norm):
            return change.norm(owner, name.removeprefix(f"{owner.name}.")).to(self._dtype)
        if isinstance(owner, Linear) and name == owner.bias_name:
            return change.bias(owner).to(self._dtype)
        if self._in_rows(name, owner):
            return self.rows(name, 0, self._shapes[name][0])
        out = _room_for(self._shapes[name], self._dtype)
        flat = out.view(len(out), -1)
        assert isinstance(owner, Linear)  # an embedding is always computed in rows
        W = change.source.read(self._source_name(name)).reshape(flat.shape)
        if owner.reads_heads:
            wide = _room_for(flat.shape, change.work)
            for columns in _parts(flat.shape[1], len(flat)):
                wide[:, columns] = change.output_side(owner, W[:, columns])
            for rows in _parts(*flat.shape):
                part = change.input_side(owner, wide[rows])
                flat[rows] = change.rescale(owner, part, rows, slice(None))
            return out
        if change.changes_input(owner):
            wide = _room_for(flat.shape, change.work)
            for rows in _parts(*flat.shape):
                wide[rows] = change.input_side(owner, W[rows])
            W = wide
        for columns in _parts(flat.shape[1], len(flat)):
            part = change.output_side(owner, W[:, columns])
            flat[:, columns] = change.rescale(owner, part, slice(None), columns)
        return out

    def _weight_rows(self, owner: Embedding | Linear | Norm, start: int, stop: int) -> Tensor:
        assert not isinstance(owner, Norm)
        source = self._source_name(owner.weight_name)
        rows = self._transform.source.rows(source, start, stop)
        if isinstance(owner, Embedding):
            return self._transform.embedding(owner, rows)
        turned = self._transform.input_side(owner, rows)
        return self._transform.rescale(owner, turned, slice(start, stop), slice(None))

    def _source_name(self, name: str) -> str:
        """A tied head is made from the embedding."""
        family = self._transform.family
        if family.tied and name == family.head.weight_name:
            return family.embedding.weight_name
        return name


def _room_for(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, over a file where it is large."""
    count = math.prod(shape)
    if count * dtype.itemsize <= LARGEST_IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile() as file:  # its name goes, its pages stay while mapped
        file.truncate(count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def _owners(family: Family) -> Iterator[tuple[str, Embedding | Linear | Norm]]:
    """Every tensor's name with the module that it belongs to."""
    for module in family.modules:
        yield f"{module.name}.weight", module
        if not isinstance(module, Embedding) and module.bias:
            yield f"{module.name}.bias", module


def _parts(count: int, width: int) -> Iterator[slice]:
    """Runs of `count` vectors of `width` numbers, about PART numbers at a time."""
    step = max(1, PART // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
