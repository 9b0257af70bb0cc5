"""What `qbuild inspect` tells of a QNN context binary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.formats.qnn_binary import LIBRARY, QnnGraph, read_qnn_binary, read_target

if TYPE_CHECKING:
    from collections.abc import Mapping

HOW = "not read: pip install 'qbuild[qnn]', or qbuild toolchain install onnxruntime-qnn"


def summary(
    path: str | PathLike[str], library: str | None = None
) -> tuple[Mapping[str, object], tuple[QnnGraph, ...]]:
    """Target and versions, and the graphs. library: libQnnSystem.so; by default that of the
    onnxruntime-qnn in this Python. Without any the target alone is told, and how to get the rest.

    Raises FormatError for a damaged file.
    """
    found = library or _of_this_python()
    if found is None:
        soc, arch = read_target(path)
        return {"soc": soc, "arch": f"v{arch}", "graphs": HOW}, ()
    binary = read_qnn_binary(path, found)
    told = asdict(binary) | {
        "arch": f"v{binary.arch}",
        "graphs": [graph.name for graph in binary.graphs],
    }
    return told, binary.graphs


def rows(graphs: tuple[QnnGraph, ...]) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, type with encoding, shape, bytes) of every input, then every output."""
    for graph in graphs:
        for side, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                kind = f"{side} {tensor.type}"
                if tensor.scale is not None:
                    kind += f" {tensor.scale:.6g} @ {tensor.zero_point}"
                yield tensor.name, kind, tensor.shape, tensor.nbytes


def _of_this_python() -> str | None:
    package = find_spec("onnxruntime_qnn")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parents[1] / LIBRARY)
