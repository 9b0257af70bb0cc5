"""ggml's search for a sub-block's scale and minimum, by weighted least squares.

Levels 0 .. top stand for scale * level + minimum, the minimum at most 0. The plain fit from
minimum to maximum is tried against roundings on slightly other grids, each solved for the best
scale and minimum. Sub-blocks are independent, so all of a chunk are searched side by side, each
with its sums in C's order. Source: ggml `make_qkx2_quants`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buildsys.quant.rounding import F32, ROUND_LIMIT, nearest_int, sum_in_order


@dataclass(frozen=True)
class Grid:
    """What a block type asks of the search.

    size: weights in a sub-block. top: the highest level. first: offset of the first grid; there
    are `steps` more, `step` apart. absolute: the error to beat is a sum of magnitudes and weights
    are magnitudes; else of squares, and weights are raised by their root mean square.
    """

    size: int
    top: int
    first: float
    steps: int
    absolute: bool = False
    step: float = 0.1


@dataclass
class Fit:
    """Per sub-block [m]: the best fit so far, and the rounding that its levels came from."""

    scale: F32
    minimum: F32
    error: F32
    inverse_scale: F32
    offset: F32


def search(x: F32, grid: Grid, weight: F32 | None = None) -> Fit:
    """The best fit of every column of x [size, m]. weight [size, m]: in place of ggml's own."""
    weight = _weights(x, grid) if weight is None else weight
    sum_w, sum_x = sum_in_order(weight), sum_in_order(weight * x)
    low, high = x.min(axis=0), x.max(axis=0)
    best = _first_fit(x, weight, np.minimum(low, np.float32(0)), high, grid)
    for step in range(grid.steps + 1):
        # `best.minimum` has moved since the last step: C uses the moved one, for both.
        shift = np.float32(grid.step) * np.float32(step) + np.float32(grid.first)
        target = shift + np.float32(grid.top)
        inverse = target / (high - best.minimum)
        levels = _round_to_levels(x, inverse, best.minimum, low, high, grid)
        wl = weight * levels
        sum_l, sum_xl = sum_in_order(wl), sum_in_order(wl * x)
        wl *= levels
        sum_l2 = sum_in_order(wl)
        D = sum_w * sum_l2 - sum_l * sum_l
        scale: F32 = np.divide(sum_w * sum_xl - sum_x * sum_l, D)
        minimum: F32 = np.divide(sum_l2 * sum_x - sum_l * sum_xl, D)
        positive = minimum > 0
        np.copyto(scale, sum_xl / sum_l2, where=positive)
        minimum[positive] = 0
        error = _error(x, weight, levels, scale, minimum, grid)
        _keep_better(best, (D > 0) & (error < best.error), scale, minimum, error, inverse)
    flat = high == np.minimum(low, np.float32(0))
    best.scale[flat] = 0
    best.minimum[flat] = high[flat]
    best.inverse_scale[flat] = 0
    return best


def final_levels(x: F32, best: Fit, scale: F32, minimum: F32, grid: Grid) -> npt.NDArray[np.uint8]:
    """Levels [m, size] of x [size, m] for the scales and minima [m] as they are stored.

    Where the stored scale is zero C leaves the levels of the search, so they are made again.
    """
    levels = nearest_int((x + minimum) / scale)
    dead = scale == 0
    if bool(dead.any()):
        v = best.inverse_scale[dead] * (x[:, dead] - best.offset[dead])
        levels[:, dead] = nearest_int(v)
    return np.ascontiguousarray(np.clip(levels, 0, grid.top).astype(np.uint8).T)


def _weights(x: F32, grid: Grid) -> F32:
    if grid.absolute:
        return np.abs(x)
    weights: F32 = np.sqrt(sum_in_order(x * x) / np.float32(grid.size)) + np.abs(x)
    return weights


def _first_fit(x: F32, weight: F32, minimum: F32, high: F32, grid: Grid) -> Fit:
    inverse = np.float32(grid.top) / (high - minimum)
    scale = np.float32(1) / inverse
    levels = _round_to_levels(x, inverse, minimum, minimum, high, grid)
    error = _error(x, weight, levels, scale, minimum, grid)
    return Fit(scale, minimum, error, inverse, minimum.copy())


def _keep_better(
    best: Fit, better: npt.NDArray[np.bool_], scale: F32, minimum: F32, error: F32, inverse: F32
) -> None:
    np.copyto(best.offset, best.minimum, where=better)
    np.copyto(best.inverse_scale, inverse, where=better)
    np.copyto(best.scale, scale, where=better)
    np.copyto(best.minimum, minimum, where=better)
    np.copyto(best.error, error, where=better)


def _round_to_levels(x: F32, inverse: F32, minimum: F32, low: F32, high: F32, grid: Grid) -> F32:
    """Levels 0 .. top as float32. Products are monotone in x: the ends tell if rint will do."""
    top = np.float32(grid.top)
    ends = np.maximum(np.abs(inverse * (low - minimum)), np.abs(inverse * (high - minimum)))
    v = inverse * (x - minimum)
    if bool((ends <= ROUND_LIMIT).all()):
        np.rint(v, out=v)
        return np.clip(v, np.float32(0), top, out=v)
    return np.clip(nearest_int(v), 0, grid.top).astype(np.float32)


def _error(x: F32, weight: F32, levels: F32, scale: F32, minimum: F32, grid: Grid) -> F32:
    difference = scale * levels
    difference += minimum
    difference -= x
    if grid.absolute:
        np.abs(difference, out=difference)
    else:
        difference *= difference
    difference *= weight
    return sum_in_order(difference)
