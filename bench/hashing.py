"""qbuild's digest of a file beside other tools' and beside what this processor can do at all.

    python bench/hashing.py [--sizes 1 16 256 1024] [--repeat 7] [--json]

Sizes are MiB; every file is in the page cache. All take turns in one process or as programs of
their own (b3sum, xxhsum, sha256sum, md5sum, ccache: those that are installed), so that a machine
whose clock varies does it to all of them alike. GB/s per second of CPU on one core, the best and
the median of the rounds; of a program, without what it takes for an empty file.

Two rows are no tool but bounds: `blake3, hot` digests one block over and over that never leaves
the cache, and `read` reads the file and looks at nothing. What reads first and digests then
cannot be faster than the two in series: `bound` is that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from buildsys.identity import BLOCK, hash_file

MIB = 1 << 20
LEAST = 64 * MIB  # bytes in a measurement: small files are read several times
DOIT_BLOCK = 8192  # doit's get_file_md5 reads that much at a time
OURS, HOT, READ = "qbuild", "blake3, hot", "read"
PROGRAMS = {
    "b3sum (mmap)": ("b3sum", "--num-threads", "1"),
    "b3sum (read)": ("b3sum", "--num-threads", "1", "--no-mmap"),
    "ccache (XXH3)": ("ccache", "--checksum-file"),
    "xxhsum (XXH3)": ("xxhsum", "-H3"),
    "sha256sum": ("sha256sum",),
    "md5sum": ("md5sum",),
}
ONE_FILE = "ccache"  # it takes no more: a small one would drown in its start


class Row(NamedTuple):
    """GB/s per core-second, the best and the median of the rounds."""

    size: int
    name: str
    best: float
    median: float


def hot(block: bytes, size: int) -> None:
    hasher = blake3()
    for _ in range(size // len(block)):
        hasher.update(block)
    hasher.hexdigest()


def read_only(path: Path) -> None:
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def md5_as_doit(path: Path) -> None:
    hasher = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(DOIT_BLOCK):
            hasher.update(block)
    hasher.hexdigest()


def mapped(path: Path) -> None:
    blake3().update_mmap(path).hexdigest()


def sha256(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256").hexdigest()


def in_process(work: Callable[[], object], times: int) -> float:
    """CPU seconds of doing it once."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def as_program(argv: Sequence[str], paths: Sequence[Path]) -> float:
    """CPU seconds of a program that is given these files."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*argv, *paths], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measurements(path: Path, empty: Path, size: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Everything that takes turns: its name, and CPU seconds for the file."""
    times = max(1, LEAST // size)
    block = os.urandom(BLOCK)
    yield OURS, partial(in_process, partial(hash_file, str(path)), times)
    yield HOT, partial(in_process, partial(hot, block, size), times)
    yield READ, partial(in_process, partial(read_only, path), times)
    yield "blake3, mmap", partial(in_process, partial(mapped, path), times)
    yield "sha256 (Python)", partial(in_process, partial(sha256, path), times)
    yield "md5 as doit", partial(in_process, partial(md5_as_doit, path), times)
    for name, argv in PROGRAMS.items():
        if shutil.which(argv[0]) and (times == 1 or argv[0] != ONE_FILE):
            yield name, partial(of_program, argv, path, empty, times)


def of_program(argv: Sequence[str], path: Path, empty: Path, times: int) -> float:
    start = as_program(argv, [empty] * times)
    return max(1e-9, as_program(argv, [path] * times) - start) / times


def measure(folder: Path, size: int, repeat: int) -> list[Row]:
    """All of them on one file of so many bytes, in turns."""
    path, empty = folder / f"{size}", folder / "empty"
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    empty.touch()
    seconds: dict[str, list[float]] = {}
    for _ in range(repeat):
        for name, measured in measurements(path, empty, size):
            seconds.setdefault(name, []).append(measured())
    path.unlink()
    return [
        Row(size // MIB, name, size / min(each) / 1e9, size / statistics.median(each) / 1e9)
        for name, each in seconds.items()
    ]


def with_bound(rows: Sequence[Row]) -> list[Row]:
    """Read first, digest then: no faster than both in series."""
    read, digest = (next(row for row in rows if row.name == name) for name in (READ, HOT))
    series = (1 / (1 / r + 1 / d) for r, d in zip(read[2:], digest[2:], strict=True))
    return [*rows, Row(rows[0].size, "bound", *series)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for size in args.sizes:
            rows += with_bound(measure(Path(name), size * MIB, args.repeat))
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return
    ours = {row.size: row for row in rows if row.name == OURS}
    print(f"{'MiB':>5} {'':16} {'best':>7} {'median':>7}  qbuild / this")
    for row in rows:
        ratio = ours[row.size].median / row.median
        print(f"{row.size:>5} {row.name:16} {row.best:7.2f} {row.median:7.2f}  {ratio:6.2f}")


if __name__ == "__main__":
    main()
