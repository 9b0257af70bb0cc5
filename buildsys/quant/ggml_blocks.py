"""ggml's block types: sizes, and quantize / dequantize by name. Bytes are ggml's, exactly.

"Exactly" means ggml's scalar reference compiled without FMA contraction, which is what every
PyPI wheel carries; a contracted build differs in about 5 % of Q4_K blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from buildsys.quant import legacy_blocks, q2_k, q3_k, q4_k, q5_k, q6_k
from buildsys.quant.compiled import available
from buildsys.quant.errors import QuantError
from buildsys.quant.rounding import F32

Bytes = npt.NDArray[np.uint8]

# Weights quantized at a time: the float32 temporaries stay in the second-level cache.
CHUNK = 1 << 18


@dataclass(frozen=True)
class BlockType:
    """`weights` consecutive weights of a row are stored in `size` bytes.

    quantize and dequantize are numpy; `compiled` names ("module:function") a kernel that gives
    the same bytes faster where numba is installed.
    """

    name: str
    weights: int
    size: int
    quantize: Callable[[F32], Bytes]
    dequantize: Callable[[Bytes], F32]
    compiled: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight with scales, such as 4.5."""
        return 8 * self.size / self.weights


BLOCKS: Mapping[str, BlockType] = MappingProxyType(
    {
        block.name: block
        for block in (
            BlockType(
                "Q4_0",
                32,
                18,
                legacy_blocks.quantize_q4_0,
                legacy_blocks.dequantize_q4_0,
                "buildsys.quant.legacy_compiled:quantize_q4_0",
            ),
            BlockType(
                "Q8_0",
                32,
                34,
                legacy_blocks.quantize_q8_0,
                legacy_blocks.dequantize_q8_0,
                "buildsys.quant.legacy_compiled:quantize_q8_0",
            ),
            BlockType(
                "Q2_K",
                256,
                q2_k.BLOCK_BYTES,
                q2_k.quantize_q2_k,
                q2_k.dequantize_q2_k,
                "buildsys.quant.q2_k_lanes:quantize_q2_k",
            ),
            BlockType(
                "Q3_K",
                256,
                q3_k.BLOCK_BYTES,
                q3_k.quantize_q3_k,
                q3_k.dequantize_q3_k,
                "buildsys.quant.q3_k_lanes:quantize_q3_k",
            ),
            BlockType(
                "Q4_K",
                256,
                q4_k.BLOCK_BYTES,
                q4_k.quantize_q4_k,
                q4_k.dequantize_q4_k,
                "buildsys.quant.q4_k_lanes:quantize_q4_k",
            ),
            BlockType(
                "Q5_K",
                256,
                q5_k.BLOCK_BYTES,
                q5_k.quantize_q5_k,
                q5_k.dequantize_q5_k,
                "buildsys.quant.q5_k_lanes:quantize_q5_k",
            ),
            BlockType(
                "Q6_K",
                256,
                q6_k.BLOCK_BYTES,
                q6_k.quantize_q6_k,
                q6_k.dequantize_q6_k,
                "buildsys.quant.q6_k_lanes:quantize_q6_k",
            ),
        )
    }
)


def block_type(name: str) -> BlockType:
    """The block type of that name, or a QuantError with the names there are."""
    if name not in BLOCKS:
        raise QuantError(f"type: {name!r} is unknown here; use one of {', '.join(BLOCKS)}")
    return BLOCKS[name]


def quantize(x: npt.ArrayLike, type_name: str, *, name: str = "tensor", threads: int = 1) -> Bytes:
    """Quantize x [..., in_features], float32, to blocks [x.size / weights, bytes] in row order.

    threads: they share the chunks, which are independent; bytes do not depend on their number.
    Raises QuantError, naming `name`, where in_features does not divide into blocks or a value is
    not finite.
    """
    block = block_type(type_name)
    values = np.asarray(x, dtype=np.float32)
    width = values.shape[-1] if values.ndim else 1
    if width % block.weights:
        raise QuantError(
            f"{name}: rows of {width} weights do not divide into {type_name} blocks of "
            f"{block.weights}; name a fallback type such as Q8_0 or keep it in float"
        )
    rows = values.reshape(-1, block.weights)
    blocks = np.empty((len(rows), block.size), dtype=np.uint8)
    kernel = _kernel(block, values.size)
    step = CHUNK // block.weights

    def make(first: int) -> None:
        part = rows[first : first + step]
        if not np.isfinite(part).all():
            raise QuantError(f"{name}: has values that are not finite; the checkpoint is damaged")
        # Zero divisors and overflow are part of the reference's arithmetic.
        with np.errstate(all="ignore"):
            blocks[first : first + step] = kernel(part)

    _share(make, range(0, len(rows), step), threads)
    return blocks


def _share(make: Callable[[int], None], chunks: range, threads: int) -> None:
    """Kernels and numpy let go of the interpreter's lock while they compute."""
    if threads == 1 or len(chunks) == 1:
        for chunk in chunks:
            make(chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(make, chunks))  # raises what a chunk raised


def _kernel(block: BlockType, weights: int) -> Callable[[F32], Bytes]:
    """The numpy kernel, or the compiled one where it exists, is installed and pays its start."""
    if block.compiled is None or weights < CHUNK or not available():
        return block.quantize
    module, function = block.compiled.split(":")
    # By name: the bytes are the same, so the compiled kernels are no part of what an artifact
    # was made from, and code that follows imports must not take them for one.
    kernel: Callable[[F32], Bytes] = getattr(importlib.import_module(module), function)
    return kernel


def dequantize(blocks: npt.ArrayLike, type_name: str) -> F32:
    """The float32 weights [number of blocks * weights] that blocks [..., bytes] stand for."""
    block = block_type(type_name)
    raw = np.asarray(blocks, dtype=np.uint8).reshape(-1, block.size)
    values = np.empty((len(raw), block.weights), dtype=np.float32)
    step = CHUNK // block.weights
    for first in range(0, len(raw), step):
        values[first : first + step] = block.dequantize(raw[first : first + step])
    return values.reshape(-1)
