"""A virtual environment with pinned requirements from the user's package index.

Wheels only: nothing that a registry holds runs while it is installed. pip keeps what it has
fetched in its own cache, so that starting over after a kill fetches no wheel twice.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.toolchains.installing import InstallFailed
from buildsys.toolchains.versions import fits, version_of

if TYPE_CHECKING:
    from buildsys.toolchains.installing import Job


def install(destination: Path, job: Job) -> None:
    """Make the environment at `destination`, from scratch. Raises InstallFailed."""
    if destination.exists():
        shutil.rmtree(destination)  # a killed pip leaves packages that look whole and are not
    python = chosen_python(job)
    job.say(f"making an environment with {python}")
    inside = destination / "bin" / "python"
    if python == sys.executable and find_spec("pip") is not None:
        # Its own pip fills the environment: half the time, and Debian's Python can do no other.
        job.run([python, "-m", "venv", "--without-pip", destination])
        pip: list[str | Path] = [python, "-m", "pip", "--python", inside]
    else:
        job.run([python, "-m", "venv", destination])
        pip = [inside, "-m", "pip"]
    pip += ["--disable-pip-version-check", "--no-input"]
    requirements = list(job.described["requirements"])
    job.say(f"installing {', '.join(requirements)}")
    job.run([*pip, "install", "--progress-bar=off", "--only-binary=:all:", *requirements])
    job.run([*pip, "check"])
    for module in job.described.get("imports", ()):
        job.run([inside, "-I", "-c", f"import {module}"])


def chosen_python(job: Job) -> str:
    """The Python that runs qbuild, where it fits; else the newest python3.N on PATH that does.

    Raises InstallFailed where none fits.
    """
    wanted: Mapping[str, str] = job.described.get("python") or {}
    if fits(f"{sys.version_info[0]}.{sys.version_info[1]}", wanted):
        return sys.executable
    for path in sorted(_pythons(job.environment), key=_version_in, reverse=True):
        if fits(path.name.removeprefix("python"), wanted):
            return str(path)
    words = " and ".join(f"{word} {version}" for word, version in wanted.items())
    raise InstallFailed(
        f"{job.name} needs a Python {words}, and none is on PATH",
        remedy="Install one (Debian: apt install python3-venv; or uv python install).",
    )


def _version_in(path: Path) -> tuple[int, ...]:
    return version_of(path.name.removeprefix("python"))


def _pythons(environment: Mapping[str, str]) -> Iterator[Path]:
    """python3.N programs on PATH."""
    for folder in environment.get("PATH", "").split(os.pathsep):
        for path in Path(folder).glob("python3.*") if folder else ():
            if re.fullmatch(r"python3\.\d+", path.name) and os.access(path, os.X_OK):
                yield path
