"""Quantizers and rotations: qbuild beside ggml's C and beside the dense product.

    python bench/quant.py [--json] [--weights 4194304] [--repeat 5]

Ours and the peer take turns on the same weights in one process on one thread. Figures are
millions of weights per core-second (process CPU time, median of the repetitions); the ratio is
ours over the peer's, so more than 1 is faster. Rows `threads: N` are qbuild alone, N threads
beside one: by CPU time, where 1 says that sharing costs nothing, and by the clock, where N is the
most that there is. --json prints a
list of {what, ours, peer, unit, ratio}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

# One thread, said before the libraries read it: rates are per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ggml_peer
import numpy as np
import torch
from torch import Tensor

from buildsys.quant import ggml_blocks
from buildsys.quant.random_rotation import make_rotation
from buildsys.quant.recover import recover
from buildsys.quant.rotation import rotate_input, rotate_output

UNIT = "Mweights per core-second"
CLOCK_UNIT = "Mweights per second"
SCALED = ("Q4_K", "Q6_K")


class Comparison(NamedTuple):
    """The same work by qbuild and by a peer, over `weights` weights."""

    what: str
    weights: int
    ours: Callable[[], object]
    peer: Callable[[], object]
    clock: Callable[[], float] = time.process_time
    unit: str = UNIT


class Row(NamedTuple):
    """One line of the table, and one entry of --json."""

    what: str
    ours: float
    peer: float
    unit: str
    ratio: float


def block_comparisons(weights: int) -> Iterator[Comparison]:
    """Every block type against `ggml_quantize_chunk`; none, with the remedy, without libggml."""
    found = ggml_peer.find_ggml()
    if found is None:
        print(ggml_peer.REMEDY, file=sys.stderr)
        return
    name, peer = found
    columns = 2048
    x = np.random.default_rng(0).standard_normal((weights // columns, columns), dtype=np.float32)
    for type_name in sorted(ggml_blocks.BLOCKS):
        yield Comparison(
            f"{type_name}, peer {name}",
            x.size,
            partial(ggml_blocks.quantize, x, type_name),
            partial(peer, x, type_name),
        )


def rotation_comparisons(weights: int) -> Iterator[Comparison]:
    """W R and R^T W in float64 at sizes of real models, by factors and by the dense matrix."""
    for size in (1536, 3584):
        W = torch.randn(weights // size, size, dtype=torch.float32)
        columns = W.T.contiguous()
        dense = make_rotation(size).dense()
        R = recover(dense)
        yield Comparison(
            f"W R, n={size}, peer dense product",
            W.numel(),
            partial(rotate_input, W, R),
            partial(dense_product, W, dense),
        )
        yield Comparison(
            f"R^T W, n={size}, peer dense product",
            W.numel(),
            partial(rotate_output, columns, R),
            partial(dense_product, dense.T, columns),
        )


def thread_comparisons(weights: int, threads: int) -> Iterator[Comparison]:
    """`threads` threads beside one: what they cost in CPU time (1 is nothing), and by the clock,
    which says something only on a machine without other work."""
    x = np.random.default_rng(0).standard_normal((weights // 2048, 2048), dtype=np.float32)
    for name in SCALED:
        both = [partial(ggml_blocks.quantize, x, name, threads=count) for count in (threads, 1)]
        label = f"{name}, threads: {threads}, peer one thread"
        yield Comparison(f"{label}, CPU", x.size, both[0], both[1])
        clock = time.perf_counter, CLOCK_UNIT
        yield Comparison(f"{label}, clock", x.size, both[0], both[1], *clock)


def dense_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float64, rounded to float32."""
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.float32)


def compare(comparison: Comparison, repeat: int) -> Row:
    """Ours and the peer by turns, `repeat` times each after one unmeasured round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeat + 1):
        for work, measured in zip((comparison.ours, comparison.peer), seconds, strict=True):
            start = comparison.clock()
            work()
            if round_ > 0:
                measured.append(comparison.clock() - start)
    ours, peer = (comparison.weights / statistics.median(s) / 1e6 for s in seconds)
    return Row(
        comparison.what, round(ours, 2), round(peer, 2), comparison.unit, round(ours / peer, 3)
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--weights", type=int, default=1 << 22)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", help="rows whose name begins so")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for comparison in (
        *block_comparisons(args.weights),
        *rotation_comparisons(args.weights),
        *thread_comparisons(args.weights, args.threads),
    ):
        if args.only is not None and not comparison.what.startswith(args.only):
            continue
        row = compare(comparison, args.repeat)
        rows.append(row._asdict())
        if not args.json:
            print(f"{row.what:45} ours {row.ours:8.1f}  peer {row.peer:8.1f}  x{row.ratio:.2f}")
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
