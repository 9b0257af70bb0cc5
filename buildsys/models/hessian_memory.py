"""What GPTQ holds of a decoder layer beside the layer itself, and how it stays below a limit.

Of every tensor of n values that linears of the layer read: 4 n^2 bytes, the Hessian in float32,
from the pass over the samples until its linears are rounded. While one is solved: two matrices in
float64, 16 n^2 (measured), for which 20 n^2 are reckoned. So a layer takes

    4 (n_1^2 + ... + n_k^2) + 20 max(n_i^2)    bytes,

or, where that is above the limit, one pass over the samples for each part of the tensors that
stays below it. The least that there is is 24 max(n_i^2): less is an error before the work starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from buildsys.models.errors import ModelError

if TYPE_CHECKING:
    from buildsys.models.family import Family, Linear

HELD, SOLVING = 4, 20  # bytes for each number of a Hessian
MIB = 1 << 20
# Beside layer and Hessians: the interpreter with torch, one sample, parts of tensors.
AROUND = 700 * MIB


def hessian_bytes(inputs: Sequence[int]) -> int:
    """Bytes for linears that read tensors of so many values, all at once."""
    squares = [n * n for n in inputs]
    return HELD * sum(squares) + SOLVING * max(squares, default=0)


def batches(family: Family, linears: Iterable[Linear], limit: int | None) -> list[list[Linear]]:
    """The linears of one layer in parts that stay below the limit (bytes), in their order; those
    that read one tensor are in one part. Raises ModelError, naming the linear, the bytes that it
    needs and the limit, where one alone is above it."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(family.group_of[linear.name][0], []).append(linear)
    found: list[list[Linear]] = []
    sizes: list[int] = []
    for group in groups.values():
        inputs = group[0].shape[1]
        _refuse(group[0], limit)
        if found and (limit is None or hessian_bytes([*sizes, inputs]) <= limit):
            found[-1] += group
            sizes.append(inputs)
        else:
            found.append(list(group))
            sizes = [inputs]
    return found


def _refuse(linear: Linear, limit: int | None) -> None:
    needed = hessian_bytes([linear.shape[1]])
    if limit is not None and needed > limit:
        raise ModelError(
            f"GPTQ needs {-(-needed // MIB)} MiB for its {linear.shape[1]} inputs (24 n^2 bytes), "
            f"and {max(limit, 0) // MIB} MiB are left for it",
            tensor=f"{linear.name}.weight",
            remedy=f"Reserve {-(-(needed - limit) // MIB)} MiB more with `resources: "
            "{memory: ...}`, or leave GPTQ out.",
        )


def limit_of(family: Family, memory: int | None) -> int | None:
    """Bytes left for Hessians of the `memory` that a step reserves (None: no limit): without a
    layer in float32, twice, and what is around it."""
    if memory is None:
        return None
    layers: dict[int, int] = {}
    for linear in family.linears.values():
        if linear.tower == "language" and linear.layer is not None:
            size = linear.shape[0] * linear.shape[1]
            layers[linear.layer] = layers.get(linear.layer, 0) + size
    return memory - 8 * max(layers.values(), default=0) - AROUND


def check_limit(family: Family, names: Iterable[str], limit: int | None) -> None:
    """ModelError for a limit below what any of these linears of the language model needs; it
    names the one that needs most."""
    linears = [family.linears[name] for name in names]
    own = [each for each in linears if each.tower == "language" and each.layer is not None]
    for linear in sorted(own, key=lambda each: -each.shape[1]):
        _refuse(linear, limit)
