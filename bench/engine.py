"""Null build, one-leaf edit and full build: qbuild beside make, ninja, doit (and snakemake).

    python bench/engine.py [--steps 100 1000 10000] [--json] [--repeat 5] [--snakemake]

Every tool runs in the same run on the same graph (bench/graphs.py). Figures are CPU seconds
of the tool and its children, wall seconds, and the peak memory of the tool's own process; the
median of the repetitions. The ratio is qbuild's CPU over the rival's. "floor" is bench/floor.py:
what the same promises cost a Python program that does nothing else; it has full builds only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import graphs

FLOOR = str(Path(__file__).with_name("floor.py"))


class Tool(NamedTuple):
    """A build tool: how its graph is written and how it is called (two jobs at a time)."""

    name: str
    write: Callable[[Path, int], None]
    argv: tuple[str, ...]


class Figure(NamedTuple):
    """CPU and wall seconds, and peak resident MiB of the process itself."""

    cpu: float
    wall: float
    peak: float


def tools(with_snakemake: bool) -> list[Tool]:
    """The tools that are installed here; the missing ones are named on standard error."""
    python = Path(sys.executable).parent
    found = [Tool("qbuild", graphs.write_qbuild, (str(python / "qbuild"), "all", "bench.yaml"))]
    rivals = [
        Tool("make", graphs.write_make, ("make", "-j2", "-s", "all")),
        Tool("ninja", graphs.write_ninja, ("ninja", "-j2", "--quiet")),
        Tool("floor", graphs.write_floor, (sys.executable, FLOOR, "graph.json")),
        Tool("doit", graphs.write_doit, (str(python / "doit"), "-n", "2", "-P", "thread")),
    ]
    if with_snakemake:
        argv = ("snakemake", "--cores", "2", "--quiet", "all")
        rivals.append(Tool("snakemake", graphs.write_snakemake, argv))
    for tool in rivals:
        if shutil.which(tool.argv[0]):
            found.append(tool)
        else:
            print(f"{tool.name} is not installed: left out", file=sys.stderr)
    return found


def measure(argv: Sequence[str], folder: Path) -> Figure:
    """Run once and read the operating system's account of that one child."""
    environment = {**os.environ, "QBUILD_CACHE": str(folder / "cache")}
    start = time.perf_counter()
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(argv, cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{(folder / 'log').read_text()[-2000:]}")
    return Figure(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024)


def median(figures: Sequence[Figure]) -> Figure:
    """Field by field."""
    return Figure(*(statistics.median(column) for column in zip(*figures, strict=True)))


@contextmanager
def project(tool: Tool, steps: int) -> Iterator[Path]:
    """A fresh folder with the graph and its source file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "src").write_text("source\n")
        tool.write(folder, steps)
        yield folder


def one_leaf(folder: Path, tool: Tool, steps: int, round_: int) -> None:
    """Remove the output of a step that nothing else reads: exactly one step has to run."""
    leaf = f"o{steps - 1 - round_}"
    (folder / "build/bench" / leaf if tool.name == "qbuild" else folder / leaf).unlink()


def run_tool(tool: Tool, steps: int, repeat: int) -> dict[str, Figure]:
    """Full build once, then null builds and one-leaf builds `repeat` times each."""
    with project(tool, steps) as folder:
        full = measure(tool.argv, folder)
        if tool.name == "floor":
            return {"full": full}
        # Stamps younger than two seconds are not trusted by qbuild: let the tree settle.
        measure(tool.argv, folder)
        time.sleep(2.1)
        measure(tool.argv, folder)
        null = median([measure(tool.argv, folder) for _ in range(repeat)])
        leaves = []
        for round_ in range(repeat):
            one_leaf(folder, tool, steps, round_)
            leaves.append(measure(tool.argv, folder))
        return {"full": full, "null": null, "one leaf": median(leaves)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--snakemake", action="store_true", help="minutes slower")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for steps in args.steps:
        ours: dict[str, Figure] = {}
        for tool in tools(args.snakemake):
            figures = run_tool(tool, steps, args.repeat)
            ours = ours or figures
            for what, figure in figures.items():
                row = {"steps": steps, "what": what, "tool": tool.name, **figure._asdict()}
                rows.append({**row, "ratio": ours[what].cpu / figure.cpu})
                if not args.json:
                    print(
                        f"{steps:>6} {what:>9} {tool.name:>10}  cpu {figure.cpu:8.3f} s  "
                        f"wall {figure.wall:8.3f} s  {figure.peak:6.1f} MiB  "
                        f"qbuild/this {rows[-1]['ratio']:6.2f}",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
