"""A QNN context binary for HTP: what it was compiled for, its graphs, and their tensors.

The target's SoC and arch stand in it as text. Graphs and tensors are told by Qualcomm's own
libQnnSystem (in the wheel of onnxruntime-qnn), asked in a process of its own.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from buildsys.formats import qnn_system
from buildsys.formats.errors import FormatError

# Of context blobs 4.x, which QNN 2.51 writes and reads; the fourth word counts the contexts.
MAGIC = bytes.fromhex("00000002 00000003 00000000".replace(" ", ""))
TARGET = re.compile(rb"soc_type=([A-Z0-9]{1,16});arch=([0-9]{2,3})")
LIBRARY = "onnxruntime_qnn/libQnnSystem.so"
REMEDY = "It is damaged, or made by a newer QNN than this libQnnSystem knows."


@dataclass(frozen=True)
class QnnTensor:
    """An input or output of a graph. scale, zero_point: None where it is not quantized."""

    name: str
    type: str
    shape: tuple[int, ...]
    scale: float | None
    zero_point: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        bits = int("".join(filter(str.isdigit, self.type)) or 8)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class QnnGraph:
    """One compiled graph."""

    name: str
    inputs: tuple[QnnTensor, ...]
    outputs: tuple[QnnTensor, ...]


@dataclass(frozen=True)
class QnnBinary:
    """soc, arch: as the compiler wrote them down ("SM8650", 75); soc_model: QNN's number of it.
    build, core_api, backend_api, blob: versions."""

    soc: str
    arch: int
    soc_model: int
    build: str
    core_api: str
    backend_api: str
    blob: str
    graphs: tuple[QnnGraph, ...]


def is_qnn_binary(path: Path) -> bool:
    """Does the file begin as a context binary does?"""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_target(path: str | PathLike[str]) -> tuple[str, int]:
    """(SoC, arch) that a context binary was compiled for. Raises FormatError where it names
    none, or several."""
    place = Path(path)
    if not place.is_file() or place.stat().st_size == 0:
        raise FormatError("is no QNN context binary: it is empty or missing", file=path)
    with (
        place.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        found = {(soc.decode(), int(arch)) for soc, arch in TARGET.findall(content)}
    if len(found) != 1:
        names = ", ".join(sorted(f"{soc} v{arch}" for soc, arch in found)) or "no target"
        raise FormatError(f"names {names}, not one target", file=path, remedy=REMEDY)
    return found.pop()


def read_qnn_binary(path: str | PathLike[str], library: str | PathLike[str]) -> QnnBinary:
    """Everything that is known of a context binary. library: libQnnSystem.so.

    Raises FormatError where the library refuses it.
    """
    soc, arch = read_target(path)
    done = subprocess.run(
        [sys.executable, "-I", qnn_system.__file__, fspath(library), fspath(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"it died (code {done.returncode})"])[-1]
        raise FormatError(f"cannot be read: {said}", file=path, remedy=REMEDY)
    told = json.loads(done.stdout)
    graphs = tuple(_graph(each) for each in told["graphs"])
    versions = {key: str(told[key]) for key in ("build", "core_api", "backend_api", "blob")}
    return QnnBinary(soc, arch, told["soc_model"], graphs=graphs, **versions)


def _graph(told: dict[str, Any]) -> QnnGraph:
    return QnnGraph(told["name"], tuple(_tensors(told["inputs"])), tuple(_tensors(told["outputs"])))


def _tensors(told: list[dict[str, Any]]) -> Iterator[QnnTensor]:
    for each in told:
        yield QnnTensor(**{**each, "shape": tuple(each["shape"])})
