"""Blocks by the importance of each column (mean x^2 of what the linear reads): ggml's bytes.

Formats stay what they are; a weight counts by its column's importance and by its own size, in
the search for scales, for minima, and for the factors that those are stored by.
Source: ggml `quantize_row_q*_impl` with `quant_weights` (`make_qkx3_quants`, `make_qx_quants`,
`make_qp_quants`), without FMA contraction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from buildsys.quant import q2_k, q3_k, q4_k, q5_k, q6_k
from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import BLOCKS, CHUNK, Bytes
from buildsys.quant.level_steps import step_levels
from buildsys.quant.min_max_search import final_levels, search
from buildsys.quant.q6_k import ZERO
from buildsys.quant.rounding import F32, fp16_bytes, fp16_values, nearest_int, sum_in_order

IMATRIX_TYPES = ("Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# The grids of the plain types, searched in 37 steps half as far apart.
_GRIDS = {
    "Q2_K": replace(q2_k.GRID, first=-0.9, steps=36, step=0.05, absolute=False),
    "Q4_K": replace(q4_k.GRID, first=-0.9, steps=36, step=0.05),
    "Q5_K": replace(q5_k.GRID, first=-0.9, steps=36, step=0.05),
}
_HALF = {"Q4_0": 8, "Q3_K": 4, "Q6_K": 32}


def imatrix_blocks(
    W: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    type_name: str = "Q4_0",
    *,
    name: str = "tensor",
) -> Bytes:
    """W [rows, columns] as blocks [n, bytes] in row order, by the importance of columns [columns].

    Bytes of ggml's quantizer with this imatrix. Raises QuantError, naming `name`, for a type
    other than IMATRIX_TYPES, or where the columns do not divide into blocks.
    """
    if type_name not in IMATRIX_TYPES:
        raise QuantError(
            f"{name}: an imatrix makes {', '.join(IMATRIX_TYPES)} here, not {type_name}"
        )
    width, block = W.shape[1], BLOCKS[type_name]
    if width % block.weights or importance.shape != (width,):
        raise QuantError(
            f"{name}: {width} columns with {importance.size} importances in {type_name}"
        )
    made = []
    for part in np.array_split(W, max(1, W.size // CHUNK)):
        with np.errstate(all="ignore"):  # zero divisors are part of the reference's arithmetic
            made.append(_rows(np.ascontiguousarray(part, dtype=np.float32), importance, type_name))
    return np.concatenate(made)


def _rows(W: F32, importance: F32, type_name: str) -> Bytes:
    if type_name == "Q4_0":
        return _q4_0(W, importance)
    x = W.reshape(-1, 256)
    own = np.broadcast_to(importance, W.shape).reshape(-1, 256)
    if type_name == "Q6_K":
        return _q6_k(x, own)
    mean = sum_in_order(np.ascontiguousarray((x * x).T)) / np.float32(256)
    sigma2 = mean if type_name == "Q2_K" else np.float32(2) * mean
    weights = own * np.sqrt(sigma2[:, None] + x * x)
    return _q3_k(x, weights) if type_name == "Q3_K" else _min_max(x, weights, type_name)


def _min_max(x: F32, weights: F32, type_name: str) -> Bytes:
    """Q2_K, Q4_K, Q5_K: scales and minima of sub-blocks, and the two factors of a block."""
    grid = _GRIDS[type_name]
    groups = 256 // grid.size
    columns, by = _columns(x, grid.size), _columns(weights, grid.size)
    best = search(columns, grid, by)
    total = sum_in_order(by).reshape(-1, groups)
    top = 15 if type_name == "Q2_K" else 63
    d, ls = positive_multiples(best.scale.reshape(-1, groups), total, top)
    dmin, lm = positive_multiples(-best.minimum.reshape(-1, groups), total, top)
    stored = [
        (fp16_values(fp16_bytes(factor))[:, None] * each.astype(np.float32)).reshape(-1)
        for factor, each in ((d, ls), (dmin, lm))
    ]
    levels = final_levels(columns, best, stored[0], stored[1], grid)
    pack = {"Q2_K": q2_k.pack, "Q4_K": q4_k.pack, "Q5_K": q5_k.pack}[type_name]
    return pack(d, ls, dmin, lm, levels)


def positive_multiples(values: F32, weights: F32, top: int) -> tuple[F32, Bytes]:
    """values [n, k] as multiples 0 .. top of one factor each row: factor [n], multiples [n, k].

    ggml's make_qp_quants: nine grids are tried, then single multiples are changed as long as the
    weighted least-squares fit gets better.
    """
    x, w = _transposed(values), _transposed(weights)
    largest = np.maximum(x.max(axis=0), np.float32(0))
    limit = np.float32(top)
    inverse = limit / largest
    best = _fit_error(x, w, inverse, limit)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = (np.float32(0.1) * np.float32(step) + limit) / largest
        error = _fit_error(x, w, tried, limit)
        better = error < best
        inverse, best = np.where(better, tried, inverse), np.where(better, error, best)
    levels = np.minimum(nearest_int(inverse * x), top).astype(np.float32)
    sum_xl, sum_l2 = step_levels(x, w, levels, lambda q: np.minimum(q, top), alone=False)
    dead = largest < ZERO
    levels[:, dead] = 0
    factor: F32 = np.where(dead | ~(sum_l2 > 0), np.float32(0), sum_xl / sum_l2)
    return factor, np.ascontiguousarray(levels.T).astype(np.uint8)


def _fit_error(x: F32, w: F32, inverse: F32, limit: np.float32) -> F32:
    levels = np.minimum(nearest_int(inverse * x).astype(np.float32), limit)
    difference = x - (np.float32(1) / inverse) * levels
    return sum_in_order(w * difference * difference)


def _q3_k(x: F32, weights: F32) -> Bytes:
    columns, by = _columns(x, 16), _columns(weights, 16)
    found = signed_scales(columns, by, _HALF["Q3_K"])
    total = sum_in_order(by).reshape(-1, 16)
    factor = signed_scales(_transposed(found.scale.reshape(-1, 16)), _transposed(total), 32)
    multiples = (factor.levels.T.astype(np.int16) - 32).astype(np.int8)
    stored = q3_k.times_multiples(factor.scale, multiples)
    levels = np.clip(nearest_int(columns / stored), -4, 3) + 4
    dead = stored == 0  # C leaves the levels of the search
    levels[:, dead] = found.levels[:, dead]
    return q3_k.pack(factor.scale, multiples, np.ascontiguousarray(levels.T).astype(np.uint8))


def _q6_k(x: F32, importance: F32) -> Bytes:
    columns = _columns(x, 16)
    found = signed_scales(columns, _columns(importance, 16), _HALF["Q6_K"])
    d, multiples, zero = q6_k.super_scale(found.scale.reshape(-1, 16))
    stored = q3_k.times_multiples(d, multiples)
    levels = np.clip(nearest_int(columns / stored), -32, 31) + 32
    dead = stored == 0
    levels[:, dead] = found.levels[:, dead]
    blocks = q6_k.pack(levels, multiples, d)
    blocks[zero] = 0
    return blocks


def _q4_0(W: F32, importance: F32) -> Bytes:
    """Here the mean square is a row's, added up from left to right in float32."""
    squares = W * W
    mean = np.add.accumulate(squares, axis=1, dtype=np.float32)[:, -1] / np.float32(W.shape[1])
    weights = importance[None] * np.sqrt(mean[:, None] + squares)
    found = signed_scales(_columns(W, 32), _columns(weights, 32), _HALF["Q4_0"])
    nibbles = found.levels[:16] | found.levels[16:] << 4
    return np.hstack([fp16_bytes(found.scale), np.ascontiguousarray(nibbles.T)])


@dataclass(frozen=True)
class Signed:
    """Scales [m], and levels 0 .. 2 half - 1 [size, m] around the middle."""

    scale: F32
    levels: Bytes


def signed_scales(x: F32, weights: F32, half: int) -> Signed:
    """ggml's make_qx_quants with weights, for columns of x [size, m] and `half` levels on a side.

    A column that counts as zero has scale 0 and levels 0, not in the middle.
    """
    peak = x[np.abs(x).argmax(axis=0), np.arange(x.shape[1])]
    dead = np.abs(peak) < ZERO
    safe = np.where(dead, np.float32(1), peak)
    best: F32 = np.full(x.shape[1], -1, np.float32)
    scale = np.zeros(x.shape[1], np.float32)
    levels = np.full(x.shape, half, np.uint8)
    for step in (0, *range(-9, 0), *range(1, 10)):
        shifted = np.float32(half) + np.float32(0.1) * np.float32(step)
        scaled: F32 = (-shifted / safe * x).astype(np.float32, copy=False)
        q = np.clip(nearest_int(scaled), -half, half - 1).astype(np.float32)
        product, square = sum_in_order(weights * x * q), sum_in_order(weights * q * q)
        found = (square > 0) if step == 0 else (square > 0) & (product * product > best * square)
        ratio = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        scale = np.where(found, ratio, scale)
        best = np.where(found, ratio * product, np.float32(0) if step == 0 else best)
        kept = found if step else np.ones_like(found)
        levels = np.where(kept, (q + half).astype(np.uint8), levels)
    levels[:, dead] = 0
    return Signed(np.where(dead, np.float32(0), scale), levels)


def _columns(x: F32, size: int) -> F32:
    """Rows of sub-blocks as columns [size, m], so that sums run along the first axis."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _transposed(x: F32) -> F32:
    return np.ascontiguousarray(x.T)
