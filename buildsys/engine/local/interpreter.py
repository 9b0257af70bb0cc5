"""How another Python process of qbuild's own is started, and with what environment."""

from __future__ import annotations

import json
import os
import sys

# A new interpreter must find what this one finds, also where qbuild runs from a clone or a
# test has put a folder on the path, and nothing of it may leak into a step's environment.
BOOT = (
    "import sys, json, importlib; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(sys.argv[3:])"
)
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
# A step never downloads: whatever it reads is a declared and digested input.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def command(module: str, arguments: list[str], *, flags: tuple[str, ...] = ()) -> list[str]:
    """The argument list of an interpreter that runs `module.main(arguments)`."""
    # An entry may be relative to this process's folder, and the new one starts elsewhere.
    path = [os.path.abspath(entry) for entry in sys.path]
    return [sys.executable, *flags, "-c", BOOT, json.dumps(path), module, *arguments]


def base_environment(threads: int) -> dict[str, str]:
    """What every process of a step starts from; nothing of the caller's own environment."""
    count = str(threads)
    return {
        "PATH": DEFAULT_PATH,
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        # Threads that wait sleep: on a machine with other work, spinning ones take the core
        # that the thread they wait for needs. Which thread sums what does not depend on it.
        "OMP_WAIT_POLICY": "PASSIVE",
        **dict.fromkeys(THREAD_VARIABLES, count),
    }


def step_environment(declared: dict[str, str], staging: str, threads: int) -> dict[str, str]:
    """A step's whole environment: the base, and what is declared, which wins.

    Home and temporary files are in the staging folder itself: making and removing a folder
    for them would cost a short step more than its own work does.
    """
    return {**base_environment(threads), "HOME": staging, "TMPDIR": staging, **declared}
