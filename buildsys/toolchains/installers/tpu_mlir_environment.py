"""The surroundings in which TPU-MLIR's programs run: a folder of their own, and nothing of ours.

They call each other by name, by `python3` and by `parallel`, keep kernels that they have compiled
in a cache, and take whatever PYTHONPATH and LD_LIBRARY_PATH hold for theirs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from buildsys.toolchains.installers.tpu_mlir_inside import __path__ as inside_paths

CONVERTER = "python/tools/llm_convert.py"
MODEL_TOOL = "bin/model_tool"
STAND_INS = {"torch.py": "torch_stand_in.py", "safetensors.py": "safetensors_stand_in.py"}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


def inside(name: str) -> Path:
    """A program of qbuild's that runs in the compiler's Python."""
    return Path(next(iter(inside_paths))) / name


def lay_out_stand_ins(folder: Path) -> None:
    """Put the stand-ins into a folder of modules, under the names of what they stand for."""
    for name, source in STAND_INS.items():
        shutil.copyfile(inside(source), folder / name)


def compiler_environment(
    python: str | Path, package: str | Path, work: Path, nets: Mapping[str, object]
) -> dict[str, str]:
    """The whole environment for the compiler, and the files below `work` that it needs.

    python: the Python 3.10; package: the folder tpu_mlir; nets: the settings of `parallel`,
    see tpu_mlir_inside/parallel.py. Kernels are kept in `work`/ppl.
    """
    programs = work / "bin"
    programs.mkdir(parents=True)
    # By name they start python3, which must be this one wherever it lies.
    _write_program(programs / "python3", f'exec {shlex.quote(os.fspath(python))} "$@"')
    program = shlex.quote(os.fspath(inside("parallel.py")))
    _write_program(programs / "parallel", f'exec {shlex.quote(os.fspath(python))} {program} "$@"')
    settings = work / "nets.json"
    settings.write_text(json.dumps(nets), encoding="utf-8")
    for name in ("home", "tmp", "ppl", "tuning"):
        (work / name).mkdir()
    modules = [os.path.join(package, "python")]
    if not any(os.path.exists(os.path.join(package, "..", name)) for name in ("torch", "torch.py")):
        # Somebody's own environment, by the wheel's requirements alone.
        (work / "modules").mkdir()
        lay_out_stand_ins(work / "modules")
        modules.append(os.fspath(work / "modules"))
    # Where a Python brings cmake along, it lies beside it.
    path = [os.fspath(programs), os.path.dirname(os.fspath(python)), SYSTEM_PATH]
    return {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(modules),
        "TPUC_ROOT": os.fspath(package),
        "PPL_CACHE_PATH": os.fspath(work / "ppl"),
        "AUTOTUNE_CACHE_PATH": os.fspath(work / "tuning"),
        "HOME": os.fspath(work / "home"),
        "TMPDIR": os.fspath(work / "tmp"),
        "SHELL": "/bin/bash",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "LLM_GEN_MLIR_WORKERS": str(nets["jobs"]),
        "QBUILD_NETS": os.fspath(settings),
    }


def _write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)
