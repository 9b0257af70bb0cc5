"""Finds a CPython 3.10: TPU-MLIR has extension modules for that one alone.

A name on PATH proves nothing (pyenv's shim is there and fails), and one that works may not be on
PATH at all: candidates are run before they are believed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from glob import glob

VARIABLE = "QBUILD_PYTHON310"
# What the compiler needs of it: extension modules that a Python built in haste lacks.
PROBE = (
    "import sys, ctypes, mmap, ssl, venv, zlib; "
    "print(sys.implementation.name, sys.version_info[0], sys.version_info[1], sys.executable)"
)
# Where managers of Pythons put them, below the home folder unless a variable says otherwise.
FOLDERS = (
    ("PYENV_ROOT", "~/.pyenv", "versions/3.10*/bin/python3.10"),
    ("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python", "cpython-3.10*/bin/python3.10"),
    ("CONDA_PREFIX", "~/miniconda3", "envs/*/bin/python3.10"),
    ("", "/opt", "python*3.10*/bin/python3.10"),
)
SECONDS = 30
HOW = (
    "Get one: `uv python install 3.10`, or `pyenv install 3.10`, or your distribution's python3.10 "
    f"with its venv module (Ubuntu 22.04: apt install python3.10-venv). Then run the same again; "
    f"{VARIABLE} names one that lies elsewhere."
)


def find_python310(environment: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """(the first candidate that works, and why the ones before it do not)."""
    refused: list[str] = []
    for candidate in dict.fromkeys(_candidates(environment)):
        why = _why_not(candidate, environment)
        if why is None:
            return candidate, refused
        refused.append(f"{candidate}: {why}")
    return None, refused


def _candidates(environment: Mapping[str, str]) -> Iterator[str]:
    if named := environment.get(VARIABLE):
        yield os.path.expanduser(named)
        return  # who names one wants that one
    for folder in environment.get("PATH", "").split(os.pathsep):
        path = os.path.join(folder, "python3.10")
        if folder and os.access(path, os.X_OK):
            yield path
        if os.path.basename(folder) == "shims":  # pyenv's: what they stand for is beside them
            beside = os.path.join(os.path.dirname(folder), "versions/3.10*/bin/python3.10")
            yield from sorted(glob(beside), reverse=True)
    for variable, usual, pattern in FOLDERS:
        root = environment.get(variable) or os.path.expanduser(usual)
        yield from sorted(glob(os.path.join(root, pattern)), reverse=True)


def _why_not(candidate: str, environment: Mapping[str, str]) -> str | None:
    """None for a CPython 3.10 that runs."""
    # Without the variables that would lend it another Python's library.
    clean = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [candidate, "-I", "-c", PROBE],
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return said[-1] if done.stderr.startswith("Traceback") else " ".join(said[:1]) or "it fails"
    if not done.stdout.startswith("cpython 3 10 "):
        return f"it is {' '.join(done.stdout.split()[:3])}"
    return None
