"""The digest of a file, remembered under what stat says of it.

The memory is disposable: without it every file is read again, and nothing else changes. A
digest is remembered only if the file had last changed at least two seconds before it was
read: on a coarse clock a later edit might leave the same stamp. An output that was written
some time before it was put in place needs no second reading: an edit leaves another mtime.
"""

from __future__ import annotations

import json
import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from buildsys.engine.own_file import replace_file
from buildsys.identity import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from buildsys.plan.graph import Json

# dev, inode, size, mtime_ns, ctime_ns
Stamp: TypeAlias = tuple[int, int, int, int, int]
SIZE = 2  # which of these it is
SETTLED_NS = 2_000_000_000
SECOND_NS = 1_000_000_000
TICK_NS = 50_000_000  # no clock of a file system that counts below seconds is as coarse
VERSION = 1
# In the time that opening one file takes, so many bytes can be read; and as long as reading so
# many bytes it takes to write what is known of one file.
OPENED, WRITTEN = 4096, 128


class Moved(NamedTuple):
    """A file that has another stamp than at the last look in this run: it was written, touched,
    linked or replaced, whatever its bytes are now."""

    name: str
    before: Stamp
    now: Stamp


def stamp_of(found: os.stat_result) -> Stamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_settled(stamp: Stamp, now_ns: int) -> bool:
    """Would any edit from now on leave another stamp, even on a clock of whole seconds?"""
    return now_ns - max(stamp[3], stamp[4]) >= SETTLED_NS


def is_placed_late(stamp: Stamp) -> bool:
    """Was it written a tick or more before its last change of place, so that an edit from then
    on cannot leave this mtime (but by setting it)? Whole seconds tell of a clock of seconds."""
    mtime, ctime = stamp[3:]
    whole = mtime % SECOND_NS == 0 or ctime % SECOND_NS == 0
    return ctime - mtime >= (SETTLED_NS if whole else TICK_NS)


class Stamps:
    """Digests of files under `root`, and of others by absolute path; one stat per file and run.

    Invariant: `_digests[name]` is a stamp, and the digest of the bytes that the file had under
    it; it counts only while the file still has that stamp.
    """

    def __init__(
        self,
        root: str,
        store: str,
        clock_ns: Callable[[], int] = time.time_ns,
        vouched: Callable[[str, Stamp], bool] = lambda digest, stamp: False,
    ) -> None:
        """vouched: does somebody know that a file of this stamp has these bytes? Asked where
        the ctime alone has changed, as it does when another folder links the same blob."""
        self._vouched = vouched
        self._prefix = root + "/"
        self._store = store
        self._clock_ns = clock_ns
        self._known: dict[str, list[Json]] = _read(store)
        self._seen: dict[str, tuple[Stamp, int] | None] = {}
        self._digests: dict[str, tuple[Stamp, str]] = {}
        self._unsaved = 0  # bytes to read again where what was learnt is not kept
        self.hashed: list[str] = []
        self.moved: list[Moved] = []  # see `Moved`, in the order in which it was noticed
        self.hash_one: Callable[[str], str] = hash_file  # a trace puts a watch around it

    def path(self, name: str) -> str:
        """The place of a file: `name` is absolute, or relative to the root."""
        return name if name[0] == "/" else self._prefix + name

    def mode(self, name: str, *, follow: bool) -> int | None:
        """What kind of file it is (stat's mode); None: not there."""
        seen = self._look(name, follow)
        return None if seen is None else seen[1]

    def file(self, name: str, *, follow: bool) -> str | None:
        """The digest of a regular file; None where there is none."""
        seen = self._look(name, follow)
        if seen is None or not stat.S_ISREG(seen[1]):
            return None
        held = self._digests.get(name)
        if held is None or held[0] != seen[0]:
            if held is not None:
                self.moved.append(Moved(name, held[0], seen[0]))
            held = self._digests[name] = (seen[0], self._digest(name, seen[0]))
        return held[1]

    def stamp(self, name: str, *, follow: bool) -> Stamp | None:
        """The stamp of what is there."""
        seen = self._look(name, follow)
        return None if seen is None else seen[0]

    def saw(self, name: str, found: os.stat_result) -> None:
        """What somebody else's stat call said of a file just now."""
        self._seen[name] = (stamp_of(found), found.st_mode)

    def put(self, name: str, digest: str, stamp: Stamp) -> None:
        """A file that was just put in place, and that had these bytes under this stamp. It may
        have another by now: then it is read again."""
        self._seen.pop(name, None)
        self._digests[name] = (stamp, digest)
        if is_placed_late(stamp):
            self._known[name] = [*stamp, digest]
            self._unsaved += OPENED + stamp[SIZE]

    def is_as_put(self, name: str, digest: str) -> bool:
        """Has a file the stamp still under which it was last known to have these bytes?"""
        self._seen.pop(name, None)
        seen = self._look(name, follow=False)
        return seen is not None and self._digests.get(name) == (seen[0], digest)

    def expire(self) -> None:
        """From now on ask the system again: files may have changed since they were looked at."""
        self._seen.clear()

    def save(self) -> None:
        """Write what was learnt, if to learn it again would take longer than to write all that is
        known; silently not, where the disk does not take it."""
        if self._unsaved <= WRITTEN * len(self._known):
            return
        content = {"version": VERSION, "files": self._known}
        try:
            replace_file(self._store, json.dumps(content, separators=(",", ":")))
        except OSError:
            # A full or read-only disk costs the next run some hashing, and that is all.
            return
        self._unsaved = 0

    def _look(self, name: str, follow: bool) -> tuple[Stamp, int] | None:
        if name in self._seen:
            return self._seen[name]
        try:
            found = os.stat(self.path(name), follow_symlinks=follow)
        except (FileNotFoundError, NotADirectoryError):
            self._seen[name] = None
            return None
        seen = self._seen[name] = (stamp_of(found), found.st_mode)
        return seen

    def _digest(self, name: str, stamp: Stamp) -> str:
        known = self._known.get(name)
        if known is not None and known[:5] == list(stamp):
            digest: str = known[5]
            return digest
        if known is not None and known[:4] == list(stamp[:4]) and self._vouched(known[5], stamp):
            known[4] = stamp[4]
            self._unsaved += OPENED
            return str(known[5])
        began = self._clock_ns()
        digest = self.hash_one(self.path(name))
        self.hashed.append(name)
        if is_settled(stamp, began):
            self._known[name] = [*stamp, digest]
            self._unsaved += OPENED + stamp[SIZE]
        else:
            self._known.pop(name, None)
        return digest


def _read(store: str) -> dict[str, list[Json]]:
    try:
        with open(store, "rb") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    files: dict[str, list[Json]] = content["files"]
    return files
