"""Weights that AWQ or GPTQ quantized, dequantized as they are read.

A linear `X` is stored as `X.qweight`, `X.qzeros` (unsigned integers of `bits` bits, packed into
int32) and `X.scales` [groups, out]; its weight [out, in] is (q - zero) * scale, computed in
float32, where it is exact.

    AWQ ("gemm")  qweight [in, out / n], n = 32 / bits to a word, in the order 0 2 4 6 1 3 5 7
    GPTQ          qweight [in / n, out], lowest bits first; qzeros hold zero - 1 (format "gptq")
                  or zero ("gptq_v2"); `X.g_idx` [in] says which group each input is of

Source: AutoAWQ and AutoGPTQ, whose packed weights the tests read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from buildsys.formats.config_file import ConfigFile
from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import TensorSource

WORD = 32
# Where AWQ's packing puts eight columns, from the lowest bits of a word on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACKED, WEIGHT = ".qweight", ".weight"
PARTS = (PACKED, ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's integers lie. group: inputs that share a scale; -1 for all of them.
    stored_zero: what is to be added to a stored zero point."""

    method: Literal["awq", "gptq"]
    bits: int
    group: int
    stored_zero: int = 0

    @property
    def per_word(self) -> int:
        return WORD // self.bits


def read_packing(config: ConfigFile) -> Packing | None:
    """What config.json says of quantized weights; None where it says nothing.

    Raises FormatError naming the field, for a method or a packing that is not known here.
    """
    if not config.has("quantization_config"):
        return None
    told = config.section("quantization_config")
    method = told.text("quant_method").lower()
    bits = told.integer("bits", 4)
    group = told.integer("group_size", 128)
    if method == "awq":
        version = told.text("version", told.text("format", "gemm")).lower()
        if version != "gemm" or bits != 4:
            raise told.wrong("version", f"is {version!r} of {bits} bits; 'gemm' of 4 can be read")
        return Packing("awq", bits, group)
    if method != "gptq":
        raise told.wrong(
            "quant_method", f"is {method!r}; checkpoints of awq and gptq can be read", REMEDY
        )
    form = told.text("checkpoint_format", told.text("format", "gptq")).lower()
    if form not in ("gptq", "gptq_v2"):
        raise told.wrong("checkpoint_format", f"is {form!r}; gptq and gptq_v2 can be read", REMEDY)
    if bits not in (2, 4, 8):
        raise told.wrong("bits", f"is {bits}; 2, 4 and 8 can be read", REMEDY)
    return Packing("gptq", bits, group, stored_zero=1 if form == "gptq" else 0)


REMEDY = "Use the model's original checkpoint."


class DequantizedTensors:
    """A TensorSource in which every packed linear is its float32 weight [out, in]."""

    def __init__(self, source: TensorSource, packing: Packing) -> None:
        self.path = source.path
        self.metadata: Mapping[str, object] = source.metadata
        self._source = source
        self._packing = packing
        stored = source.names()
        self._packed = {name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)}
        self._names = [each for name in stored if (each := self._shown(name)) is not None]

    def _shown(self, name: str) -> str | None:
        owner, dot, part = name.rpartition(".")
        if owner not in self._packed or dot + part not in PARTS:
            return name
        return owner + WEIGHT if dot + part == PACKED else None

    def _linear(self, name: str) -> str | None:
        """The packed linear that a weight is of."""
        owner = name.removesuffix(WEIGHT)
        return owner if owner != name and owner in self._packed else None

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        linear = self._linear(name)
        if linear is None:
            return self._source.shape(name)
        rows, columns = self._source.shape(linear + PACKED)
        n = self._packing.per_word
        return (columns * n, rows) if self._packing.method == "awq" else (columns, rows * n)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._linear(name) else self._source.dtype(name)

    def stored_type(self, name: str) -> str:
        packed = f"{self._packing.method} of {self._packing.bits} bits"
        return packed if self._linear(name) else self._source.stored_type(name)

    def nbytes(self, name: str) -> int:
        linear = self._linear(name)
        if linear is None:
            return self._source.nbytes(name)
        return sum(self._source.nbytes(part) for part in self._parts(linear))

    def read(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        linear = self._linear(name)
        if linear is None:
            return self._source.rows(name, start, stop)
        return self._weight(linear, slice(start, min(stop, self.shape(name)[0])))

    def release(self, name: str) -> None:
        linear = self._linear(name)
        for each in [name] if linear is None else self._parts(linear):
            self._source.release(each)

    def _parts(self, linear: str) -> list[str]:
        present = set(self._source.names())
        return [linear + part for part in PARTS if linear + part in present]

    def _weight(self, linear: str, out: slice) -> Tensor:
        """Rows [out, in] of a linear's weight: only the words that hold them are unpacked."""
        n = self._packing.per_word
        words = slice(out.start // n, -(-out.stop // n))  # of the tensors that pack along out
        inside = slice(out.start - words.start * n, out.stop - words.start * n)
        scales = self._read(linear, ".scales")[:, out].to(torch.float32)
        zeros = self._along_out(self._read(linear, ".qzeros")[:, words])[:, inside]
        zeros = zeros + self._packing.stored_zero
        q = self._read(linear, PACKED)
        if self._packing.method == "awq":
            q = self._along_out(q[:, words])[:, inside]
        else:
            q = unpack(q[:, out].T.contiguous(), self._packing.bits).T
        group = self._groups(linear, len(q), len(scales))
        return ((q - zeros[group]) * scales[group]).T.contiguous()

    def _along_out(self, words: Tensor) -> Tensor:
        found = unpack(words, self._packing.bits)
        if self._packing.method == "gptq":
            return found
        # Nibble i of a word is column AWQ_ORDER[i] of its eight.
        back = torch.tensor(AWQ_ORDER).argsort()
        return found.reshape(len(found), -1, len(AWQ_ORDER))[:, :, back].flatten(1)

    def _groups(self, linear: str, inputs: int, groups: int) -> Tensor:
        """The group of each input."""
        if f"{linear}.g_idx" in self._source.names():
            found = self._read(linear, ".g_idx").long()
        else:
            size = self._packing.group if self._packing.group > 0 else inputs
            found = torch.arange(inputs) // size
        if len(found) != inputs or int(found.max()) >= groups:
            raise FormatError(
                f"{inputs} inputs in groups of {self._packing.group} need more than the {groups} "
                "groups of scales that are stored",
                file=self.path,
                tensor=linear + PACKED,
                remedy="config.json and the weights must be of one model.",
            )
        return found

    def _read(self, linear: str, part: str) -> Tensor:
        if linear + part not in self._source.names():
            raise FormatError(
                "is missing, and the weight cannot be dequantized without it",
                file=self.path,
                tensor=linear + part,
                remedy="The download may be incomplete.",
            )
        return self._source.read(linear + part)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits` bits: int32 [m, k] -> int32 [m, k * 32 / bits], lowest first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    spread: Tensor = (words[:, :, None] >> shifts) & (2**bits - 1)
    return spread.flatten(1)
