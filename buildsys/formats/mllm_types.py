"""The type codes of .mllm files, versions 1 and 2, and what each looks like in memory.

Source: mllm v1 (`mllm/Types.hpp`, tools/convertor) and v2 (`mllm/core/DataTypes.hpp`,
pymllm/convertor). Codes up to 33 are those of v1; v2 keeps 0-30 and adds those from 128 on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import TensorEntry

LAST_SHARED_CODE = 30  # above it the two versions differ


class MllmType(IntEnum):
    """A type code as it stands in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    Q8_1 = 9
    Q8_PER_TENSOR = 10
    Q4_K = 12
    Q6_K = 14
    Q8_K = 15
    I8 = 16
    I16 = 17
    I32 = 18
    Q4_0_4_4 = 19
    Q4_0_4_8 = 20
    Q4_0_8_8 = 21
    Q8_0_4_4 = 22
    Q3_K = 23
    Q2_K = 24
    Q1_K = 25
    IQ2_XXS = 26
    IQ2_XS = 27
    IQ1_S = 28
    IQ1_M = 29
    IQ2_S = 30
    KLEIDIAI_Q4_0 = 31
    Q8_0F = 32
    Q2_0 = 33
    BF16 = 128
    U8 = 129
    U16 = 130
    U32 = 131
    I64 = 132
    U64 = 133
    BYTE = 134
    MXFP4 = 135
    I4 = 136
    U4 = 137
    I2 = 138
    U2 = 139
    I8_PER_TENSOR_SYM = 140
    I8_PER_CHANNEL_SYM = 141
    U8_PER_TENSOR_SYM = 142
    U8_PER_CHANNEL_SYM = 143
    I16_PER_TENSOR_SYM = 144
    I16_PER_CHANNEL_SYM = 145
    U16_PER_TENSOR_SYM = 146
    U16_PER_CHANNEL_SYM = 147
    I8_PER_TENSOR_ASY = 148
    I8_PER_CHANNEL_ASY = 149
    U8_PER_TENSOR_ASY = 150
    U8_PER_CHANNEL_ASY = 151
    I16_PER_TENSOR_ASY = 152
    I16_PER_CHANNEL_ASY = 153
    U16_PER_TENSOR_ASY = 154
    U16_PER_CHANNEL_ASY = 155
    BOOL = 156
    COMPLEX_F32 = 201
    COMPLEX_F64 = 202


# Types whose payload is an array of one torch dtype; all others are read as raw bytes.
PLAIN = {
    MllmType.F32: torch.float32,
    MllmType.F16: torch.float16,
    MllmType.I8: torch.int8,
    MllmType.I16: torch.int16,
    MllmType.I32: torch.int32,
    MllmType.BF16: torch.bfloat16,
    MllmType.U8: torch.uint8,
    MllmType.U16: torch.uint16,
    MllmType.U32: torch.uint32,
    MllmType.I64: torch.int64,
    MllmType.U64: torch.uint64,
    MllmType.BYTE: torch.uint8,
    MllmType.BOOL: torch.bool,
    MllmType.COMPLEX_F32: torch.complex64,
    MllmType.COMPLEX_F64: torch.complex128,
}

# (elements, bytes) of one block, as ggml and mllm lay it out.
BLOCKS = {
    MllmType.Q4_0: (32, 18),
    MllmType.Q4_1: (32, 20),
    MllmType.Q8_0: (32, 34),
    MllmType.Q2_K: (256, 84),
    MllmType.Q3_K: (256, 110),
    MllmType.Q4_K: (256, 144),
    MllmType.Q6_K: (256, 210),
    MllmType.Q8_K: (256, 292),
}


@dataclass(frozen=True)
class MllmEntry:
    """One line of a .mllm table. `shape` is the logical one; v1 does not store it."""

    name: str
    type: MllmType
    shape: tuple[int, ...]
    nbytes: int

    def payload(self) -> TensorEntry:
        """How the payload is given to the writer: typed, or raw bytes of a quantized type."""
        dtype = PLAIN.get(self.type, torch.uint8)
        if math.prod(self.shape) * dtype.itemsize == self.nbytes:
            return TensorEntry(self.name, dtype, self.shape)
        return TensorEntry(self.name, torch.uint8, (self.nbytes,))


def plain_entry(name: str, kind: MllmType, shape: tuple[int, ...]) -> MllmEntry:
    """The entry of an array that is stored as it is."""
    return MllmEntry(name, kind, shape, math.prod(shape) * PLAIN[kind].itemsize)


def block_entry(name: str, kind: MllmType, shape: tuple[int, ...]) -> MllmEntry:
    """The entry of a block-quantized tensor; its payload is raw bytes, uint8 [nbytes].

    Raises FormatError when the last axis does not divide into blocks: mllm would let blocks
    straddle rows, and its runtime would then read wrong rows.
    """
    elements, nbytes = BLOCKS[kind]
    if not shape or shape[-1] % elements:
        raise FormatError(
            f"shape {list(shape)} does not divide into {kind.name} blocks of {elements}",
            tensor=name,
            remedy=f"Choose a type whose block divides {shape[-1] if shape else 1}.",
        )
    return MllmEntry(name, kind, shape, math.prod(shape) // elements * nbytes)
