"""How each step's last run ended: from the journal, and from what failures leave beside logs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from buildsys.engine.folder import read_json, write_json
from buildsys.engine.staleness import ADOPTED

if TYPE_CHECKING:
    from buildsys.engine.failure import Failure
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.journal import Entries

How = Literal["made", "failed", "restored", "adopted", "running", "interrupted", "never"]
ROUNDING = 0.01  # seconds: times in the journal are rounded


class LastRun(NamedTuple):
    """at: when it ended (while it runs: when it last said something), seconds since the epoch.
    log: path of what it said; None where nothing is kept. "restored": the outputs came from a
    store; seconds and memory are those of the run that made them."""

    step: str
    how: How
    at: float | None = None
    seconds: float | None = None
    memory: int | None = None
    exit: int | None = None
    signal: int = 0
    error: str = ""
    log: str | None = None


def keep_failure(folder: BuildFolder, failure: Failure) -> None:
    """Remember how a step failed; a full disk takes nothing, and the log is there anyway."""
    ended = failure.ended
    content = {
        "at": round(time.time(), 3),
        "error": failure.error,
        "exit": None if ended is None else ended.code,
        "signal": 0 if ended is None else ended.signal,
        "seconds": None if ended is None else round(ended.wall, 4),
        "memory": None if ended is None else ended.peak_memory,
    }
    with contextlib.suppress(OSError):
        write_json(failed_of(folder.log(failure.step)), content)


class LeftBefore:
    """What earlier runs left of steps: their logs, and how they failed. Looked up once, by the
    holder of the build folder's lock, who alone adds to it."""

    def __init__(self, folder: BuildFolder) -> None:
        self._folder = folder
        try:
            self._names = set(os.listdir(folder.own("logs")))
        except FileNotFoundError:
            self._names = set()

    def forget(self, step: str) -> None:
        """The step starts anew: what is kept is of this run from here on."""
        log = self._folder.log(step)
        for path in (log, failed_of(log)):
            name = os.path.basename(path)
            if name in self._names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            self._names.add(name)  # this run may leave it, and there may be another one


def last_run(folder: BuildFolder, entries: Entries, step: str) -> LastRun:
    """What is known of a step's last run. Takes no lock that anybody would wait for."""
    log = folder.log(step)
    said = _changed(log)
    kept = log if said is not None else None
    failed = read_json(failed_of(log))
    record = entries.done.get(step)
    # What was adopted since then was put in the failed step's place.
    if failed is not None and (record is None or record["at"] < failed["at"]):
        return LastRun(step, "failed", log=kept, **failed)
    if record is None or (said is not None and said > record["at"] + ROUNDING):
        if said is None:
            return LastRun(step, "never")
        return LastRun(step, "running" if is_built_in(folder) else "interrupted", said, log=log)
    figures = (record["at"], record["wall"], record["memory"])
    if record.get("restored"):
        return LastRun(step, "restored", *figures, log=kept)
    if record.get("notes", {}).get(ADOPTED):
        return LastRun(step, "adopted", record["at"])
    return LastRun(step, "made", *figures, exit=0, log=kept)


def is_built_in(folder: BuildFolder) -> bool:
    """Does a qbuild, or what is left of one, hold the folder's lock?"""
    try:
        fd = os.open(folder.own("lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def failed_of(log: str) -> str:
    """Beside a step's log: how it failed."""
    return log.removesuffix(".log") + ".failed"


def _changed(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return None
