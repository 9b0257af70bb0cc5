"""Installs TPU-MLIR, Sophgo's compiler, from PyPI into a Python 3.10 environment of its own.

Its wheel alone does not do: it wants a torch that PyPI has only with a gigabyte of CUDA (a
stand-in of numpy takes its place, see tpu_mlir_inside), three files of an older C library that
break programs on a newer system are moved aside, and the result is tried on a model.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.toolchains.installers.tpu_mlir_environment import (
    CONVERTER,
    SYSTEM_PATH,
    compiler_environment,
    inside,
    lay_out_stand_ins,
)
from buildsys.toolchains.installers.tpu_mlir_python import HOW, find_python310
from buildsys.toolchains.installing import InstallFailed
from buildsys.toolchains.versions import version_of

if TYPE_CHECKING:
    from buildsys.toolchains.installing import Job

Words = list[str | Path]  # of a command
SITE_PACKAGES = "lib/python3.10/site-packages"
# Kernels for attention are compiled while a model is: that takes these.
PROGRAMS = {"bash": "bash", "cmake": "cmake", "make": "make", "cc": "gcc", "c++": "g++"}
# The wheel's own C library, of Ubuntu 22.04, and the oldest of which the system may be.
BUNDLED = ("libc.so.6", "libm.so.6", "libpthread.so.0")
GLIBC = (2, 35)


def install(destination: Path, job: Job) -> None:
    """Make the environment at `destination`. Wheels that an earlier attempt has fetched are used
    again, if their digests are right; nothing else is. Raises InstallFailed."""
    _check_machine()
    python = _python(job)
    wheels = destination.with_name(f"{destination.name}.wheels")
    lines = _requirements(job)
    pip = _pip(python)
    _fetch(job, pip, wheels, lines)
    if destination.exists():
        shutil.rmtree(destination)  # a killed pip leaves packages that look whole and are not
    job.say(f"making an environment with {python}")
    job.run([python, "-m", "venv", "--without-pip", destination])
    into: Words = ["--python", destination / "bin" / "python", "install", "--no-compile"]
    offline: Words = ["--no-index", "--find-links", wheels, "--no-warn-script-location"]
    job.run([*pip, *into, *offline, *_hashed(wheels, lines)])
    _adapt(destination / SITE_PACKAGES)
    _self_test(destination, job)
    shutil.rmtree(wheels)


def _fetch(job: Job, pip: Words, wheels: Path, lines: list[str]) -> None:
    """Fetch the wheels. pip leaves nothing where it is killed before it has them all: so the
    large one, which comes first, is fetched by itself."""
    wheels.mkdir(parents=True, exist_ok=True)
    job.say("fetching TPU-MLIR and what it needs (400 MB)")
    platforms = [word for tag in PLATFORMS for word in ("--platform", tag)]
    target: Words = ["--python-version", "3.10", "--implementation", "cp", *platforms]
    for part in (lines[:1], lines[1:]):
        fetch: Words = [*pip, "download", "--no-cache-dir", "-d", wheels, *target]
        job.run([*fetch, *_hashed(wheels, part)])


def _hashed(wheels: Path, lines: list[str]) -> Words:
    """pip's words for requirements with digests, and for nothing that these bring along."""
    path = wheels / "requirements.txt"
    path.write_text("".join(lines), encoding="utf-8")
    checks: Words = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", path]
    return ["--progress-bar=off", *checks]


PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def _check_machine() -> None:
    """Raises InstallFailed where the compiler cannot run, before anything is fetched."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise InstallFailed(f"TPU-MLIR runs on x86-64 Linux; this is {platform.machine()}")
    library = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    if version_of((library or "").rpartition(" ")[2]) < GLIBC:
        raise InstallFailed(
            f"TPU-MLIR needs glibc {'.'.join(map(str, GLIBC))} or newer; this is {library}",
            remedy="Debian 12 and Ubuntu 22.04 have it; a container of one of these does.",
        )
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        raise InstallFailed(
            f"TPU-MLIR compiles kernels with {', '.join(PROGRAMS)}; there is no "
            f"{' and no '.join(missing)} in {SYSTEM_PATH}",
            remedy="Debian, Ubuntu: apt install bash cmake make gcc g++",
        )


def _python(job: Job) -> str:
    python, refused = find_python310(job.environment)
    if python is None:
        tried = "".join(f"\n  {line}" for line in refused)
        raise InstallFailed(
            f"TPU-MLIR needs CPython 3.10, and none was found{tried and '; tried:'}{tried}",
            remedy=HOW,
        )
    return python


def _requirements(job: Job) -> list[str]:
    """The pinned requirements of the toolchain's file, each with its digest, as pip reads them."""
    pinned: dict[str, str] = job.described["options"]["requirements"]
    return [f"{name} --hash=sha256:{digest}\n" for name, digest in pinned.items()]


def _pip(python: str) -> Words:
    """qbuild's own pip, or that of the Python 3.10."""
    own = sys.executable if find_spec("pip") is not None else python
    return [own, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def _adapt(site_packages: Path) -> None:
    """What the wheel needs to run here."""
    lay_out_stand_ins(site_packages)
    package = site_packages / "tpu_mlir"
    libraries = package / "lib" / "third_party"
    aside = libraries / "glibc-aside"
    aside.mkdir()
    for name in BUNDLED:
        (libraries / name).rename(aside / name)
    for folder in ("bin", "python/tools", "cross_toolchains/ppl_compile/bin"):
        for program in (package / folder).iterdir():
            if program.is_file():
                program.chmod(program.stat().st_mode | 0o111)


def _self_test(destination: Path, job: Job) -> None:
    """Compile a model of one layer. Raises InstallFailed with what the compiler said."""
    job.say("trying it on a small model")
    python, package = destination / "bin" / "python", destination / SITE_PACKAGES / "tpu_mlir"
    work = destination / "self-test"
    settings = {"jobs": 2, "memory": None, "kept": None, "salt": ""}
    environment = compiler_environment(python, package, work, settings)
    job.run([python, inside("small_model.py"), work / "model"], PYTHONPATH="")
    argv = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    options: Words = ["-s", "32", "-q", "bf16", "-c", "bm1684x", "-o", work / "out"]
    job.run([*argv, python, package / CONVERTER, "-m", work / "model", *options])
    if not list((work / "out").glob("*.bmodel")):
        raise InstallFailed("TPU-MLIR ended well and wrote no bmodel", remedy=f"See {job.log}.")
    shutil.rmtree(work)
