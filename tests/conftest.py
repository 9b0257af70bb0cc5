"""Model folders that the tests of models and rules share; made once per run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests import tiny_models

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums of floats depend on the number of threads; tests also share their machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A run started in the background ignores SIGINT, and so would every qbuild that it tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 as `save_pretrained` writes it; float32."""
    return tiny_models.save_model(tiny_models.new_qwen2(), tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def qwen2vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL as `save_pretrained` writes it: nested config; float32, tied."""
    return tiny_models.save_model(tiny_models.new_qwen2vl(), tmp_path_factory.mktemp("qwen2vl"))


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """The golden data beside the repository; the test is skipped where it is not."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden data (../shared/golden) is not here")
    return GOLDEN
