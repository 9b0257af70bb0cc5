"""The rows of bench/quality.py: which remedies each of them takes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One set of options. pairs: what is rescaled; by: how; clipping: one method for all;
    shadow: how many layers get a shadow on the CPU; calibration: windows of 512 tokens; more:
    so many of them for GPTQ; weights: `weight_scale`; learned: Cayley steps of the rotation, with
    weights rounded to the nearest where `learn_weights`; seeds: the best of so many rotations."""

    turned: bool = True
    pairs: tuple[str, ...] = ()
    by: str = "activations"
    clipping: str = "absmax"
    rounding: str = "nearest"
    target: str = "mllm-v1-text"
    shadow: int = 0
    calibration: int = 8
    more: int = 8
    weights: str = "absmax"
    learned: int = 0
    learn_weights: bool = True
    seeds: int = 1


BOTH = ("up-down", "v-o")
ALL = (*BOTH, "gate-up")
STEPS = 16  # of learning, at the rate RATE; on windows half as long as the others
RATE = 0.03
FEW = Row(pairs=ALL, clipping="relative", rounding="gptq", weights="search")
BEST = replace(FEW, more=32)
ROWS: dict[str, Row] = {
    "no rotation, absmax": Row(turned=False),
    "absmax": Row(),
    "best of 4 rotations": Row(seeds=4),
    "learned": Row(learned=STEPS),
    "mse": Row(clipping="mse"),
    "kl": Row(clipping="kl"),
    "relative": Row(clipping="relative"),
    "up-down by weights": Row(pairs=("up-down",), by="weights"),
    "up-down": Row(pairs=("up-down",)),
    "up-down, v-o": Row(pairs=BOTH),
    "q-k by weights": Row(pairs=("q-k",), by="weights"),
    "gptq": Row(rounding="gptq"),
    "gptq, relative": Row(clipping="relative", rounding="gptq"),
    "gptq, up-down, v-o": Row(pairs=BOTH, rounding="gptq"),
    "gptq, mse, up-down, v-o": Row(pairs=BOTH, clipping="mse", rounding="gptq"),
    "relative, up-down, v-o": Row(pairs=BOTH, clipping="relative"),
    "relative, up-down, v-o, gate-up": Row(pairs=ALL, clipping="relative"),
    "all but gate-up": replace(BEST, pairs=BOTH),
    "all, 8 windows, scales at the maximum": replace(FEW, weights="absmax"),
    "all, 8 windows for GPTQ": FEW,
    "all, 16 windows for GPTQ": replace(FEW, more=16),
    "all": BEST,
    "all, best of 4 rotations": replace(BEST, seeds=4),
    "all, learned": replace(BEST, learned=STEPS, learn_weights=False),
    "all and q-k": replace(BEST, pairs=(*ALL, "q-k")),
    "vl absmax": Row(target="mllm-v1-vl"),
    "vl relative": Row(clipping="relative", target="mllm-v1-vl"),
    "vl all": replace(BEST, target="mllm-v1-vl"),
    "vl all, 2 shadow layers": replace(BEST, target="mllm-v1-vl", shadow=2),
    "vl all, 8 shadow layers": replace(BEST, target="mllm-v1-vl", shadow=8),
    "vl all, 16 shadow layers": replace(BEST, target="mllm-v1-vl", shadow=16),
    "vl all, 30 shadow layers": replace(BEST, target="mllm-v1-vl", shadow=30),
}


def slug(row: Row, seed: int) -> str:
    """What the row's files are called."""
    parts = [*start(row, seed), row.clipping, row.rounding]
    if row.rounding == "gptq":
        parts += [f"{row.more}w", row.weights]
    shadow = [f"{row.shadow}-shadows"] if row.shadow else []
    return "-".join([*parts, row.target, *shadow])


def start(row: Row, seed: int) -> list[str]:
    """The part of `slug` that rotation, factors and samples decide."""
    return [rotation(row, seed), f"{row.calibration}w", *row.pairs, row.by]


def rotation(row: Row, seed: int) -> str:
    """What the row's rotation is called."""
    if not row.turned:
        return "unturned"
    if row.seeds > 1:
        return f"{seed}-best-of-{row.seeds}"
    if not row.learned:
        return str(seed)
    weights = "" if row.learn_weights else "-activations"
    return f"{seed}-{row.learned}-steps{weights}-{row.target}"
