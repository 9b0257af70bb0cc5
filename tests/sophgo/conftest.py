"""TPU-MLIR, installed once below the tests' cache as a person installs it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from buildsys.toolchains.installers.tpu_mlir_python import find_python310

SECONDS = 900


@pytest.fixture(scope="session")
def cache() -> Path:
    """A store in which the toolchain is installed; the tests are skipped where it cannot be."""
    if find_python310(os.environ)[0] is None:
        pytest.skip("there is no CPython 3.10 here, and TPU-MLIR is for that alone")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qbuild-tests"
    store = base / "tpu-mlir"
    store.mkdir(parents=True, exist_ok=True)
    with (base / "tpu-mlir.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-m", "buildsys", "toolchain", "install", "tpu-mlir"],
            cwd=store,
            env={**os.environ, "QBUILD_CACHE": str(store)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    if done.returncode:
        why = done.stderr.strip()
        if any(word in why for word in ("cmake", "glibc", "x86-64", "Connection", "No matching")):
            pytest.skip(f"TPU-MLIR cannot be installed here: {why[-300:]}")
        pytest.fail(why)
    return store


@pytest.fixture
def compiler(cache: Path) -> dict[str, str]:
    """The environment of a qbuild whose store is its own, and whose compiler is that one."""
    (python,) = (cache / "toolchains" / "tpu-mlir").glob("*/bin/python")
    return {"QBUILD_TPU_MLIR_PYTHON": str(python)}
