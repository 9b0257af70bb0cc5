"""ggml's own quantizers, from whichever installed package carries libggml, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

Quantizer = Callable[..., npt.NDArray[np.uint8]]

# Packages whose wheels carry libggml, and how to get the smallest of them.
CARRIERS = ("llama_cpp_python", "pywhispercpp", "xllamacpp")
REMEDY = "no package with libggml is installed; run: pip install pywhispercpp"

# Code of the type in ggml.h, weights and bytes per block.
_TYPES = {
    "Q4_0": (2, 32, 18),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}


def find_ggml() -> tuple[str, Quantizer] | None:
    """(package and version, quantizer) of the first carrier found, or None.

    The quantizer takes float32 [rows, columns] and a type's name and gives blocks
    [number of blocks, bytes], by `ggml_quantize_chunk`; an importance matrix may be given, one
    float32 for each column.
    """
    for carrier in CARRIERS:
        try:
            distribution = metadata.distribution(carrier)
        except metadata.PackageNotFoundError:
            continue
        for file in distribution.files or ():
            library = _load(Path(str(distribution.locate_file(file))))
            if library is not None:
                return f"{carrier} {distribution.version}", _quantizer(library)
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    if ".so" not in path.name or not ("ggml-base" in path.name or "xllamacpp" in path.name):
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # a library for another interpreter or with a missing neighbour
        return None
    return library if hasattr(library, "ggml_quantize_chunk") else None


def _quantizer(library: ctypes.CDLL) -> Quantizer:
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    chunk.argtypes += [ctypes.c_int64] * 3 + [ctypes.c_void_p]

    def quantize(
        x: npt.NDArray[np.float32],
        type_name: str,
        imatrix: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.uint8]:
        code, weights, size = _TYPES[type_name]
        x = np.ascontiguousarray(x, dtype=np.float32)
        blocks = np.empty((x.size // weights, size), dtype=np.uint8)
        rows, columns = x.shape
        importance = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
        at = None if importance is None else importance.ctypes.data
        written = chunk(code, x.ctypes.data, blocks.ctypes.data, 0, rows, columns, at)
        if written != blocks.nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes of {type_name}, not {blocks.nbytes}")
        return blocks

    return quantize
