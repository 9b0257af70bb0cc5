"""Puts finished outputs in place, so that no moment shows a half of anything.

For every step, in this order: what it read is looked at again; an intent line; the outputs'
bytes and the intent reach the disk; renames; a `done` line; the renames and the line reach
the disk. A kill between any two leaves a step that is either done or stale. Steps that end
close together share the waits for the disk: the group is committed when it has 100 steps,
after 200 ms, when nothing else is left to do, or when one of them took over a second.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.digest import EXECUTABLE
from buildsys.engine.key import Reason
from buildsys.engine.staging import Output
from buildsys.engine.stamps import stamp_of
from buildsys.errors import QbuildError
from buildsys.store.placing import flush

if TYPE_CHECKING:
    from buildsys.engine.journal import Journal
    from buildsys.engine.stamps import Stamp, Stamps
    from buildsys.plan.graph import Json

GROUP_STEPS = 100
GROUP_SECONDS = 0.2
LONG_STEP = 1.0  # seconds: too much to lose for the sake of a shared fsync
AT_FDCWD = -100
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)


class NoPlace(QbuildError):
    """Something that qbuild did not put there is in an output's way."""


class Finished(NamedTuple):
    """A step that ended well and whose outputs wait in staging. record: its `done` line.
    digests: of the outputs and of every file in them."""

    step: str
    staging: str
    outputs: tuple[Output, ...]
    digests: Mapping[str, str]
    record: Mapping[str, Json]


class Committer:
    """Takes finished steps and commits them in groups; one thread only.

    at: called with the name of each point between two operations (tests kill there).
    """

    def __init__(
        self,
        root: str,
        journal: Journal,
        stamps: Stamps,
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._root = root
        self._journal = journal
        self._stamps = stamps
        self._at = at
        self._group: list[Finished] = []
        self._since = 0.0

    def add(self, finished: Finished) -> None:
        if not self._group:
            self._since = time.monotonic()
        self._group.append(finished)

    def due(self) -> float | None:
        """Seconds until the group must be committed; None where there is nothing."""
        if not self._group:
            return None
        if len(self._group) >= GROUP_STEPS or any(
            each.record["wall"] > LONG_STEP and "restored" not in each.record
            for each in self._group
        ):
            return 0.0
        return max(0.0, self._since + GROUP_SECONDS - time.monotonic())

    def commit(
        self, changed: Callable[[str], Sequence[Reason]]
    ) -> tuple[list[Finished], list[tuple[Finished, str]]]:
        """Commit the group: the steps that are done, and those that cannot be, with why.

        changed: what a step has read that is no longer as it was; it is not committed then.
        Raises JournalError or OSError where the disk is full; nothing is half done then.
        """
        self._at("commit")
        group, self._group = self._group, []
        refused = [(each, why) for each in group if (why := self._why_not(each, changed))]
        sound = [each for each in group if all(each is not other for other, _ in refused)]
        if sound:
            self._put_in_place(sound)
        return sound, refused

    def _why_not(self, finished: Finished, changed: Callable[[str], Sequence[Reason]]) -> str:
        """Why a step cannot be committed; empty where it can."""
        reasons = changed(finished.step)
        if reasons:
            listed = "; ".join(str(reason) for reason in reasons)
            return f"changed while the step ran, so nothing of it was kept: {listed}"
        try:
            for output in finished.outputs:
                make_way(self._root, output.path)
        except NoPlace as error:
            return f"{error.message}\n{error.remedy}"
        return ""

    def _put_in_place(self, group: Sequence[Finished]) -> None:
        outputs = [output for each in group for output in each.outputs]
        self._journal.append(
            {"kind": "intent", "step": each.step, "outputs": [o.path for o in each.outputs]}
            for each in group
        )
        self._at("intent written")
        files = [file for o in outputs for file in (*o.files, *o.folders)]
        self._flush(files)
        self._at("intent durable")
        parents: dict[str, None] = {}
        placed: dict[str, Stamp] = {}
        for each in group:
            for output in each.outputs:
                place = f"{self._root}/{output.path.rstrip('/')}"
                placed |= put_in_place(output, place)
                self._at(f"renamed {output.path}")
                parents.update(dict.fromkeys(_parents(self._root, place)))
        self._journal.append(each.record for each in group)
        self._at("done written")
        self._flush(list(parents))
        self._at("done durable")
        digests = {name: digest for each in group for name, digest in each.digests.items()}
        for name, stamp in placed.items():
            self._stamps.put(name, digests[name].removesuffix(EXECUTABLE), stamp)

    def _flush(self, paths: Sequence[str]) -> None:
        """Everything under these paths, and the journal, is on the disk afterwards."""
        flush(paths, self._root)
        self._journal.sync()


def _parents(root: str, place: str) -> Iterable[str]:
    """The folders between the root and a place in it, both ends included."""
    while place != root:
        place = os.path.dirname(place)
        yield place


def make_way(root: str, path: str) -> None:
    """Make the folders that an output lies in. Raises NoPlace where a link or a file is in the
    way: through a link, an output would leave the build folder."""
    place = root
    for part in path.rstrip("/").split("/")[:-1]:
        place = f"{place}/{part}"
        if os.path.islink(place):
            raise NoPlace(
                f"{place} is a link, and {path} would be written through it",
                remedy="remove the link",
            )
        if os.path.lexists(place) and not os.path.isdir(place):
            raise NoPlace(
                f"{place} is in the way of {path}",
                remedy="`qbuild clean --stale` removes what the recipe no longer makes",
            )
        os.makedirs(place, exist_ok=True)


def put_in_place(output: Output, place: str) -> dict[str, Stamp]:
    """Rename an output; the stamps of its files, by name. They are taken at this instant: the
    waits for the disk that follow are long enough for somebody to write to it."""
    inside = {}
    if output.path.endswith("/"):  # what is in a folder keeps its ctime when that is renamed
        start = len(output.staged) + 1
        inside = {output.path + file[start:]: stamp_of(os.lstat(file)) for file in output.files}
    replace(output.staged, place)
    try:
        return inside or {output.path: stamp_of(os.lstat(place))}
    except FileNotFoundError:  # somebody was faster: whoever looks next says that it is missing
        return {}


def replace(staged: str, place: str) -> None:
    """Put a file or a folder in place of whatever is there, in one step where the system can.

    rename(2) does it for files. For a folder that replaces a folder, and for a change of kind,
    the two are exchanged; the old one is then where the new one was, and goes with the staging
    folder. Where the file system cannot exchange, the old one is moved aside first.
    """
    if not os.path.lexists(place) or not (os.path.isdir(place) or os.path.isdir(staged)):
        os.rename(staged, place)
        return
    arguments = (AT_FDCWD, os.fsencode(staged), AT_FDCWD, os.fsencode(place), RENAME_EXCHANGE)
    if _libc.renameat2(*arguments) != 0:
        os.rename(place, f"{staged}.old")
        os.rename(staged, place)
