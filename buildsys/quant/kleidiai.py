"""Int4 weights packed for Arm's KleidiAI matmul kernels, as mllm v2 ships them; made on any host.

Blocks of 32 inputs with a bfloat16 scale each, the weight of largest magnitude at -8. Rows lie in
panels of `nr`; in a panel, for every block of inputs, the rows' nibbles interleaved in runs of
kr / sr bytes, then their scales; behind the blocks the rows' sums of dequantized weights and
their biases, float32.
Source: KleidiAI `kai_run_rhs_pack_nxk_qsi4c32p_qsu4c32s1s0`; mllm v2's KaiLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import F32

Bytes = npt.NDArray[np.uint8]

BLOCK = 32
HALF = BLOCK // 2


@dataclass(frozen=True)
class Tile:
    """How a kernel wants its weights: nr rows to a panel, kr inputs in sr splits."""

    nr: int
    kr: int
    sr: int

    @property
    def run(self) -> int:
        """Bytes of one row that lie together."""
        return self.kr // self.sr


# mllm's names of KleidiAI's kernels, without the common "qai8dxp" and "qsi4c32p".
TILES: Mapping[str, Tile] = MappingProxyType(
    {
        "qai8dxp1x8_qsi4c32p4x8_1x4x32": Tile(4, 16, 2),
        "qai8dxp1x8_qsi4c32p8x8_1x8x32": Tile(8, 16, 2),
        "qai8dxp4x8_qsi4c32p4x8_8x4x32": Tile(4, 16, 2),
        "qai8dxp4x8_qsi4c32p4x8_16x4x32": Tile(4, 16, 2),
        "qai8dxp4x8_qsi4c32p8x8_4x8x32": Tile(8, 16, 2),
        "qai8dxp1x4_qsi4c32p4x4_1x4": Tile(4, 8, 2),
    }
)


def packed_size(rows: int, columns: int, tile: Tile) -> int:
    """Bytes of a packed weight [rows, columns]."""
    padded = -(-rows // tile.nr) * tile.nr
    return padded * ((HALF + 2) * columns // BLOCK + 8)


def pack(W: F32, bias: F32 | None, tile: Tile) -> Bytes:
    """W [n, k] float32 and its bias [n] as one run of `packed_size` bytes.

    n may be any part of a weight's rows that ends with a panel, or with the weight.
    """
    q, scales = quantize(W)
    sums = _row_sums(q, scales, tile)
    biases = np.zeros(len(W), dtype=np.float32) if bias is None else bias.astype(np.float32)
    # The last panel repeats the last row; its bias is 0 there, and its sum as often.
    rows = np.minimum(np.arange(-(-len(W) // tile.nr) * tile.nr), len(W) - 1)
    panels = len(rows) // tile.nr
    blocks = np.concatenate(
        [
            _interleaved(_nibbles(q)[rows], tile),
            _bfloat16(scales)[rows].reshape(panels, tile.nr, -1).transpose(0, 2, 1).copy()
            .view(np.uint8).reshape(panels, -1, 2 * tile.nr),
        ],
        axis=2,
    )  # fmt: skip
    tails = [each[rows].reshape(panels, tile.nr).view(np.uint8) for each in (sums, biases)]
    return np.hstack([blocks.reshape(panels, -1), *tails]).reshape(-1)


def quantize(W: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """W [n, k] -> levels -8 .. 7 [n, k / 32, 32] and scales [n, k / 32], bfloat16's values.

    Levels are of the scale before it is rounded, halves away from zero, as mllm does it.
    """
    blocks = W.reshape(len(W), -1, BLOCK)
    at = np.abs(blocks).argmax(axis=2)[:, :, None]
    scale = np.take_along_axis(blocks, at, axis=2) / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
    v = (blocks * inverse).astype(np.float64)
    levels = np.clip(np.trunc(v + np.copysign(0.5, v)), -8, 7).astype(np.int8)
    rounded = (_bfloat16(scale[:, :, 0]).astype(np.uint32) << 16).view(np.float32)
    return levels, rounded


def _bfloat16(values: F32) -> npt.NDArray[np.uint16]:
    """The upper half of float32's bits, rounded half to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _nibbles(q: npt.NDArray[np.int8]) -> Bytes:
    """[n, blocks, 32] -> [n, blocks, 16]: weights j and j + 16 of a block, signed, share a byte."""
    low, high = q[:, :, :HALF].view(np.uint8), q[:, :, HALF:].view(np.uint8)
    shared: Bytes = (low & np.uint8(15)) | (high << np.uint8(4))
    return shared


def _interleaved(nibbles: Bytes, tile: Tile) -> Bytes:
    """[panels nr, blocks, 16] -> [panels, blocks, 16 nr]: a run of each row in turn."""
    count = nibbles.shape[1]
    runs = nibbles.reshape(-1, tile.nr, count, HALF // tile.run, tile.run)
    return runs.transpose(0, 2, 3, 1, 4).reshape(len(runs), count, -1)


def _row_sums(q: npt.NDArray[np.int8], scales: F32, tile: Tile) -> F32:
    """Sums of q * scale [n], added in float32 in the order of the runs, as KleidiAI adds them."""
    halves = q.reshape(len(q), q.shape[1], 2, HALF // tile.run, tile.run)
    partial = halves.sum(axis=(2, 4), dtype=np.int32).astype(np.float32)
    terms = (partial * scales[:, :, None]).reshape(len(q), -1)
    total = np.zeros(len(q), dtype=np.float32)
    for term in terms.T:
        total += term
    return total
