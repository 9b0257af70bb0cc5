"""A quantized checkpoint as what its runtime computes with: float weights and, for int8, ranges.

Readable are float checkpoints, the int8 state dict of mllm's export (.pth, or .mllm made of it)
and block-quantized .mllm files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.tensors import TensorSource
from buildsys.models.errors import ModelError
from buildsys.models.family import Family
from buildsys.models.key_layout import to_classic
from buildsys.quant.ggml_blocks import BLOCKS, dequantize

# mllm v2 calls the head that it makes of a tied embedding so.
_HEAD_OF_V2 = "model.lm_head.weight"
_FLOAT_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
_WHOLE_NAMES = {torch.int8: "I8", torch.int32: "I32"}


@dataclass(frozen=True)
class StaticRanges:
    """How the runtime quantizes one int8 linear: magnitudes (not /127) and mllm's clip flags.

    bias_is_integer: the bias is added before the output is quantized (mllm's `quant_bias`).
    """

    input: float
    output: float
    clip_input: bool
    clip_output: bool
    bias_is_integer: bool


@dataclass(frozen=True)
class Variant:
    """An opened checkpoint. `tensors` has classic names and is float32; `ranges` names every
    int8 linear (none in weight-only types)."""

    tensors: DequantizedTensors
    ranges: Mapping[str, StaticRanges]

    def types(self) -> dict[str, int]:
        """Stored type -> how many weights (of linears and the embedding) have it."""
        names = self.tensors.weights()
        return dict(sorted(Counter(self.tensors.type_name(name) for name in names).items()))

    def bits_per_weight(self) -> float:
        """Stored bits, scales within blocks included, per weight of linears and embedding."""
        names = self.tensors.weights()
        stored = sum(self.tensors.nbytes(name) for name in names)
        return 8 * stored / sum(math.prod(self.tensors.shape(name)) for name in names)


def open_variant(path: str | PathLike[str], family: Family) -> Variant:
    """Open a checkpoint of the model that `family` describes.

    Raises ModelError, naming the tensor, for one of another size, of a type that is not read,
    or an int8 weight without scales; FormatError for a damaged file.
    """
    tensors = DequantizedTensors(open_checkpoint(path), family)
    ranges = {
        linear.name: tensors.ranges(linear.name)
        for linear in family.linears.values()
        if tensors.is_integer(linear.weight_name)
    }
    return Variant(tensors, ranges)


class DequantizedTensors:
    """The family's tensors in a checkpoint of any type, read as float32, one by one."""

    def __init__(self, source: TensorSource, family: Family) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self._source = source
        self._shapes = family.shapes
        self._stored = {to_classic(name): name for name in source.names()}
        if _HEAD_OF_V2 in self._stored:
            self._stored.setdefault(family.head.weight_name, self._stored[_HEAD_OF_V2])
        self._names = [name for name in family.shapes if name in self._stored]
        for name in self._names:
            self._check(name)

    def names(self) -> Sequence[str]:
        return self._names

    def weights(self) -> list[str]:
        """Names of the matrices: linears and the embedding."""
        return [name for name in self._names if len(self._shapes[name]) > 1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def stored_type(self, name: str) -> str:
        return self._source.stored_type(self._stored[name])

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        return self._source.nbytes(self._stored[name])

    def type_name(self, name: str) -> str:
        """One name for a type, whatever the file format calls it."""
        dtype = self._source.dtype(self._stored[name])
        return {**_FLOAT_NAMES, **_WHOLE_NAMES}.get(dtype, self.stored_type(name))

    def is_integer(self, name: str) -> bool:
        return name in self._stored and self._source.dtype(self._stored[name]) in _WHOLE_NAMES

    def read(self, name: str) -> Tensor:
        stored = self._source.read(self._stored[name])
        shape = self._shapes[name]
        if stored.is_floating_point():
            return stored.reshape(shape).to(torch.float32)
        if stored.dtype in _WHOLE_NAMES:
            scale = self._scalar(f"{name}.scale")
            # mllm keeps int8 weights as [in, out].
            return stored.reshape(shape[::-1]).T.to(torch.float32) * scale
        values = dequantize(stored.numpy(), self.stored_type(name))
        return torch.from_numpy(values).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        self._source.release(self._stored[name])

    def ranges(self, linear: str) -> StaticRanges:
        """Ranges and clip flags of an int8 linear. Raises ModelError for what is missing."""
        magnitudes = [self._scalar(f"{linear}.{side}_scale") for side in ("input", "output")]
        for side, magnitude in zip(("input", "output"), magnitudes, strict=True):
            if not 0.0 < magnitude < math.inf:
                raise ModelError(
                    f"is {magnitude}, not a positive range",
                    file=self.path,
                    tensor=f"{linear}.{side}_scale",
                    remedy="Take the scales anew with statistics: absmax.",
                )
        return StaticRanges(
            input=magnitudes[0],
            output=magnitudes[1],
            clip_input=bool(self._scalar(f"{linear}.clip_input")),
            clip_output=bool(self._scalar(f"{linear}.clip_output")),
            bias_is_integer=self.is_integer(f"{linear}.bias"),
        )

    def _scalar(self, name: str) -> float:
        if name not in self._stored:
            raise ModelError(
                "is missing",
                file=self.path,
                tensor=name,
                remedy="int8 weights need their scales: make the file with rule int8-checkpoint.",
            )
        return float(self._source.read(self._stored[name]).reshape(()))

    def _check(self, name: str) -> None:
        source, stored, shape = self._source, self._stored[name], self._shapes[name]
        dtype, kind = source.dtype(stored), source.stored_type(stored)
        block = BLOCKS.get(kind)
        if dtype not in _FLOAT_NAMES and dtype not in _WHOLE_NAMES and block is None:
            message, remedy = f"has type {kind}, which cannot be evaluated", None
        elif block is not None and source.nbytes(stored) * block.weights != (
            math.prod(shape) * block.size
        ):
            message = f"has {source.nbytes(stored)} bytes, which are no {kind} {list(shape)}"
            remedy = "The file is of another model."
        elif block is None and source.shape(stored) not in _layouts(shape, dtype):
            message = f"has shape {list(source.shape(stored))}, the model needs {list(shape)}"
            remedy = "The file is of another model."
        else:
            return
        raise ModelError(message, file=self.path, tensor=name, remedy=remedy)


def _layouts(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """The shapes that a file may store for a tensor; .mllm v1 stores none."""
    return (shape[::-1] if dtype in _WHOLE_NAMES else shape), (math.prod(shape),)
