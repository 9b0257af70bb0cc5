"""Golden data and peers of the mathematics' tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("../shared/golden (files of the real tools, 36 MB) is not here")
    return folder


@pytest.fixture(scope="session")
def golden_blocks() -> dict[str, npt.NDArray[np.generic]]:
    with np.load(ROOT / "tests" / "golden" / "quant" / "ggml_blocks.npz") as archive:
        return dict(archive)


Quantizer = Callable[[npt.NDArray[np.float32], str], npt.NDArray[np.uint8]]


@pytest.fixture(scope="session", params=["libggml", "libgguf"])
def peer(request: pytest.FixtureRequest, golden_blocks: dict[str, np.ndarray]) -> Quantizer:
    """Somebody else's quantizer: float32 [rows, columns] and a type to blocks [n, bytes]."""
    quantize = _libgguf() if request.param == "libgguf" else _libggml()
    if not np.array_equal(quantize(golden_blocks["x"], "Q4_K"), golden_blocks["Q4_K"]):
        pytest.skip(
            f"this {request.param} was compiled with FMA contraction: other bytes are right"
        )
    return quantize


def _libggml() -> Quantizer:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import ggml_peer
    finally:
        sys.path.pop(0)
    found = ggml_peer.find_ggml()
    if found is None:
        pytest.skip(ggml_peer.REMEDY)
    return found[1]


def _libgguf() -> Quantizer:
    libgguf = pytest.importorskip("libgguf", reason="pip install libgguf")

    def quantize(x: npt.NDArray[np.float32], type_name: str) -> npt.NDArray[np.uint8]:
        qtype = libgguf.GGMLQuantizationType[type_name]
        size = libgguf.GGML_QUANT_SIZES[qtype][1]
        return np.asarray(libgguf.quantize_rows(x, qtype)).reshape(-1, size)

    return quantize
