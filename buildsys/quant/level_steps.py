"""Levels of a least-squares fit, changed one after the other as long as the fit gets better.

For columns x of sub-blocks and one scale each, s = sum(w x l) / sum(w l^2) fits x by s l; what is
left is least where sum(w x l)^2 / sum(w l^2) is largest. Every sum is ggml's, in its order.
Source: the second halves of ggml's `make_q3_quants` and `make_qp_quants`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from buildsys.quant.rounding import F32, I32, nearest_int, sum_in_order

PASSES = 5


def step_levels(
    x: F32,
    weights: F32,
    levels: F32,
    clip: Callable[[I32], I32],
    *,
    alone: bool,
) -> tuple[F32, F32]:
    """Improve `levels` [size, m] in place; sum(w x l) and sum(w l^2), each [m], behind it.

    clip: levels that the format has. alone: may the only level that is not zero be changed?
    (`make_q3_quants` allows it, `make_qp_quants` does not.)
    """
    sum_xl, sum_l2 = sum_in_order(weights * x * levels), sum_in_order(weights * levels * levels)
    for _ in range(PASSES):
        changed = False
        for weight, value, level in zip(weights, x, levels, strict=True):
            xl = sum_xl - weight * value * level
            l2 = sum_l2 - weight * level * level
            new = clip(nearest_int(value * l2 / xl)).astype(np.float32)
            tried_xl, tried_l2 = xl + weight * value * new, l2 + weight * new * new
            better = (xl > 0) & ((tried_l2 if alone else l2) > 0) & (new != level)
            better &= tried_xl * tried_xl * sum_l2 > sum_xl * sum_xl * tried_l2
            level[better] = new[better]
            sum_xl, sum_l2 = np.where(better, tried_xl, sum_xl), np.where(better, tried_l2, sum_l2)
            changed |= bool(better.any())
        if not changed:
            break
    return sum_xl, sum_l2
