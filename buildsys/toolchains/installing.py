"""Installs a toolchain from public registries, into a folder of its own below the cache.

The folder is filled under a lock and counts only once its mark is written (installed.py): a
killed installation leaves nothing that could be taken for a toolchain, and the next one starts
from what the installer can trust. Most toolchains are lists of pip requirements; one that needs
more names a module of its own, `installer: buildsys.toolchains.installers.NAME`, with a function
`install(destination, job)`.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from buildsys.errors import QbuildError, UsageError
from buildsys.toolchains.finding import how_to_get
from buildsys.toolchains.installed import folder_for, mark_of

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

PIP = "buildsys.toolchains.installers.pip"
LAST_LINES = 12


class InstallFailed(QbuildError):
    """A toolchain could not be installed; nothing of it counts."""


class Job(NamedTuple):
    """What an installer gets besides its destination.

    described: the `install` section of the toolchain's file. environment: the user's.
    say: one line for the person. log: the file that takes what programs print.
    lock: a descriptor that every program inherits, so that the lock is held until the last of
    them is gone, also where qbuild itself was killed.
    """

    name: str
    described: Json
    environment: Mapping[str, str]
    say: Callable[[str], None]
    log: str
    lock: int

    def run(self, argv: Sequence[str | Path], **more: str) -> None:
        """Run a program to its end. more: further variables of its environment.

        Raises InstallFailed with what it said last.
        """
        words = [os.fspath(word) for word in argv]
        with open(self.log, "ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            try:
                done = subprocess.run(
                    words,
                    env={**self.environment, **more},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(self.lock,),
                    check=False,
                )
            except OSError as error:
                raise InstallFailed(f"{words[0]} cannot be started: {error.strerror}") from error
        if done.returncode != 0:
            raise InstallFailed(
                f"{self.name} could not be installed: {os.path.basename(words[0])} ended with "
                f"{done.returncode}; it said last:\n{last_lines(self.log)}",
                remedy=f"All that it said is in {self.log}. Mend that and run the same again.",
            )


def install(
    name: str, described: Json, environment: Mapping[str, str], say: Callable[[str], None]
) -> str:
    """Install the toolchain, unless it is there already; returns its folder.

    Two at once: the second waits, and finds it done. Raises UsageError for a toolchain that
    qbuild cannot install, InstallFailed where it does not come off.
    """
    folder = folder_for(name, described, environment)
    if "install" not in described:
        how = how_to_get(described) or "its toolchain file does not say how to get it"
        raise UsageError(f"qbuild cannot install {name}", remedy=how)
    if folder is None:
        raise UsageError("there is no place to install to: QBUILD_CACHE is empty")
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with locked(f"{os.path.dirname(folder)}/lock", name, say) as lock:
            if not os.path.isfile(mark_of(folder)):
                job = Job(name, described["install"], environment, say, f"{folder}.log", lock)
                _fill(folder, job)
    except OSError as error:
        raise InstallFailed(f"{name} could not be installed: {error}") from error
    return folder


def _fill(folder: str, job: Job) -> None:
    with open(job.log, "wb"):
        pass  # what an earlier attempt said is of no use to this one
    module = importlib.import_module(job.described.get("installer", PIP))
    began = time.time()
    module.install(Path(folder), job)
    told = {"name": job.name, "install": job.described, "seconds": round(time.time() - began, 1)}
    _write_durably(mark_of(folder), json.dumps(told, indent=1))


def _write_durably(path: str, text: str) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


@contextmanager
def locked(path: str, name: str, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock; the descriptor is for programs to inherit."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name} is being installed by another qbuild: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def last_lines(log: str) -> str:
    """The end of what programs said, for a message."""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in file if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
