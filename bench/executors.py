"""One Dask worker beside two, on a wide recipe: of steps that wait, and of steps that compute.

    python bench/executors.py [--steps 16] [--seconds 2] [--json]

A scheduler and the workers (`qbuild worker --cpus 1`) are processes of their own on this machine,
are up before the clock starts, and have run a step of each kind. The ratio is that of the wall
times of `qbuild all`; beside it, the same without what a build of one instant step takes (to
import Dask, to connect, to end). Steps that compute can do no better than there are free
processors: that is what their figure tells, with the CPU seconds that the steps themselves took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from buildsys.engine.journal import read_journal

QBUILD = (sys.executable, "-m", "buildsys")
WORKERS = (1, 2)
PATIENCE = 60.0
# So many rounds of nothing but arithmetic take one step about a second of CPU.
ROUNDS = 15_000_000


class Figure(NamedTuple):
    """Wall seconds of a full build by so many workers, and of one instant step; CPU seconds of
    the steps themselves."""

    kind: str
    workers: int
    full: float
    instant: float
    cpu: float


def recipe(kind: str, steps: int, seconds: float) -> str:
    """A wide recipe without sources: every step may run at any time."""
    argv = ["sh", "-c", f'sleep {seconds}; echo > "$0"', "${out}"]
    if kind == "compute":
        code = f"import sys\nfor _ in range({int(ROUNDS * seconds)}): pass\nopen(sys.argv[1], 'w')"
        argv = [sys.executable, "-I", "-S", "-c", code, "${out}"]
    step = {"rule": "command", "options": {"argv": argv}}
    content = {"qbuild": 1, "name": kind, "artifacts": {f"s{n}": step for n in range(steps)}}
    return json.dumps(content)


@contextmanager
def started(command: Sequence[str], folder: Path, word: str) -> Iterator[None]:
    """A process, once it has printed a word; ended afterwards."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=world(folder))
        try:
            until = time.monotonic() + PATIENCE
            while word not in said(out.fileno()):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{' '.join(command)}:\n{said(out.fileno())}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()


def said(fd: int) -> str:
    return os.pread(fd, 1 << 20, 0).decode(errors="replace")


def world(folder: Path) -> dict[str, str]:
    return {**os.environ, "QBUILD_CACHE": str(folder / "store")}


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[str]:
    """A scheduler with its workers; its URL."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", *words]
    with started(command, folder, "Scheduler at"):
        while not (file.exists() and file.read_text().rstrip().endswith("}")):
            time.sleep(0.05)
        url = json.loads(file.read_text())["address"].replace("tcp:", "dask:")
        with several([*QBUILD, "worker", url, "--cpus", "1"], folder, workers):
            yield url


@contextmanager
def several(command: Sequence[str], folder: Path, count: int) -> Iterator[None]:
    if count == 0:
        yield
        return
    with started(command, folder, "worker at"), several(command, folder, count - 1):
        yield


def measure(kind: str, workers: int, steps: int, seconds: float) -> Figure:
    """The same build with so many workers, and one of a single instant step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "instant.yaml").write_text(recipe(kind, workers, 0.0))
        (folder / "full.yaml").write_text(recipe(kind, steps, seconds))
        with cluster(folder, workers) as url:
            command = [*QBUILD, "all", "--executor", url, "--build-dir"]
            # The first step of all starts a worker's supervisor: not while the clock runs.
            run([*command, "warm", "instant.yaml"], folder)
            instant = run([*command, "warm", "instant.yaml", "--force"], folder)
            full = run([*command, "build", "full.yaml"], folder)
        done = read_journal(str(folder / "build/.qbuild/journal")).done
    return Figure(kind, workers, full, instant, sum(line["cpu"] for line in done.values()))


def run(command: Sequence[str], folder: Path) -> float:
    """Wall seconds."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=world(folder), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kinds = ("wait", "compute")
    figures = [measure(kind, n, args.steps, args.seconds) for kind in kinds for n in WORKERS]
    if args.json:
        print(json.dumps([each._asdict() for each in figures], indent=1))
        return
    print("| steps | workers | wall s | instant s | steps' CPU s | ratio | without start and end |")
    print("|---|---|---|---|---|---|---|")
    for one, two in zip(figures[::2], figures[1::2], strict=True):
        for each in (one, two):
            work = (one.full - one.instant) / (each.full - each.instant)
            print(
                f"| {args.steps} that {each.kind} | {each.workers} | {each.full:.1f} "
                f"| {each.instant:.1f} | {each.cpu:.1f} | {one.full / each.full:.2f} | {work:.2f} |"
            )


if __name__ == "__main__":
    main()
