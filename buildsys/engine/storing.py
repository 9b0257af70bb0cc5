"""What the engine asks of the store: outputs that were made before, and a place for new ones.

Before a stale step runs, its key is looked up here and then in the shared cache; what is found
goes into the staging folder as if the step had written it, and is committed like anything else.
After a commit the outputs are taken in, large ones by link and at once, the rest by a thread
that copies, and then by one that uploads. A build never fails for want of the store.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Protocol

from blake3 import blake3

import buildsys
from buildsys.engine.digest import EXECUTABLE
from buildsys.engine.executor import Ended
from buildsys.engine.staging import Output, UnfitOutput, collect
from buildsys.engine.stamps import stamp_of
from buildsys.store.actions import Action, BadRecord, Entry
from buildsys.store.background import Background
from buildsys.store.local import Put, Store
from buildsys.store.remote import StoreTrouble

if TYPE_CHECKING:
    from buildsys.engine.commit import Finished
    from buildsys.engine.stamps import Stamps
    from buildsys.engine.work import Running
    from buildsys.plan.graph import Json
    from buildsys.store.remote import Remote

QUICK = 0.1  # seconds: what is made faster is not kept, unless machines share it
FIRST_PATIENCE = 2.5  # seconds until the shared cache says its first word
PATIENCE = 10.0  # and without another byte after that
FETCHERS, SENDERS = 8, 8  # most of their time they wait: for a network, or for a disk
FACTS = ("wall", "cpu", "memory", "notes", "warnings")
HERE, THERE = "the store", "the shared cache"


MACHINE = f"{sys.platform} {os.uname().machine}"


def action_key(key: str) -> str:
    """A step's key among machines: programs may differ where the processor's kind does."""
    return blake3(f"{key} {MACHINE}".encode()).hexdigest()


class Finish(Protocol):
    """Makes the journal line of a step that has ended; see `Work`."""

    def __call__(
        self,
        running: Running,
        ended: Ended,
        outputs: Sequence[Output],
        *,
        restored: Mapping[str, str],
        origin: str,
    ) -> Finished: ...


class Lookup:
    """A search for an action that may take a while. heard: when it began or something last
    arrived; 0.0 before."""

    def __init__(self, key: str, origin: str, clock: Callable[[], float]) -> None:
        self.key = key
        self.origin = origin
        self.future: Future[Action | None] = Future()
        self.heard = 0.0
        self._clock = clock

    def hear(self) -> None:
        self.heard = self._clock()

    def is_silent_for(self, patience: float) -> bool:
        return self.heard > 0 and self._clock() - self.heard > patience


class StepCache:
    """The local store, and the shared cache if there is one; called by the engine's thread.

    Invariant: only the engine's thread prints; the others leave their warnings in `_warnings`.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        stamps: Stamps,
        say: Callable[[str], None],
        forced: Collection[str] = (),
        remote: Callable[[Callable[[str], None]], Remote] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """folder: the build folder's root; forced: steps that are to run whatever is here;
        remote: makes the shared cache, given where its warnings go."""
        self._store = store
        self._folder = folder
        self._stamps = stamps
        self._say = say
        self._forced = frozenset(forced)
        self._clock = clock
        self._warnings: list[str] = []
        self._remote = remote(self._warnings.append) if remote is not None else None
        self._takes = True
        self._waiting: deque[Put] = deque()
        self._ahead: dict[str, Lookup] = {}
        self._fetchers = Background(FETCHERS)
        self._keeper = Background(1)
        self._senders = Background(SENDERS)
        self._kept: Future[None] | None = None
        self._sent: list[Future[bool]] = []
        store.used_by(folder)

    def look_up(self, step: str, key: str) -> Lookup | None:
        """Begin to look for a step's outputs; None where it is known that there are none."""
        if step in self._forced:
            return None
        key = action_key(key)
        ahead = self._ahead.pop(step, None)
        if ahead is not None and ahead.key == key:
            return ahead
        lookup = Lookup(key, HERE, self._clock)
        action = self._store.action(key)
        if action is not None:
            lookup.future.set_result(action)
            return lookup
        remote = self._remote
        if remote is None or not remote.reads:
            return None
        lookup.origin = THERE
        lookup.future = self._fetchers.submit(partial(remote.fetch, key, lookup.hear))
        return lookup

    @property
    def looks_ahead(self) -> bool:
        """Is there a shared cache, which takes its time?"""
        return self._remote is not None and self._remote.reads

    def look_ahead(self, step: str, key: str) -> None:
        """A step is ready and waits for its turn: it can be looked up meanwhile."""
        lookup = self.look_up(step, key)
        if lookup is not None:
            self._ahead[step] = lookup

    def is_settled(self, lookup: Lookup) -> bool:
        """Is it known what there is? A shared cache that stays silent is given up."""
        remote = self._remote
        if lookup.future.done() or remote is None:
            return True
        patience = PATIENCE if remote.answered else FIRST_PATIENCE
        if not remote.reads or lookup.is_silent_for(patience):
            remote.give_up(f"no answer for {patience:g} s")
            lookup.future = Future()
            lookup.future.set_result(None)
        return lookup.future.done()

    def found(self, lookup: Lookup) -> Action | None:
        """What was found, once that is known."""
        try:
            return lookup.future.result()
        except StoreTrouble as error:
            self._close_store(str(error))
            return None

    def restore(
        self, lookup: Lookup, action: Action, running: Running, finish: Finish
    ) -> Finished | None:
        """Put an action's files into a step's staging folder, as if it had run. None where that
        cannot be done: the folder may then hold a part of them. May be called in a thread."""
        staging, paths = running.staging, running.step.outputs.values()
        try:
            if not self._store.restore(lookup.key, action, staging):
                return None
            ended = ended_as(running.step.name, action)
            outputs = collect(staging, paths)
        except (OSError, UnfitOutput, BadRecord):
            return None  # where a disk is full, the step itself will say it better
        digests = {f"{staging}/{entry.path}": entry.digest for entry in action.files}
        return finish(running, ended, outputs, restored=digests, origin=lookup.origin)

    def keep(self, finished: Finished) -> None:
        """A step is committed: take its outputs in."""
        record = finished.record
        origin = record.get("restored")
        key = action_key(record["key"])
        shares = self._remote is not None and self._remote.writes
        if not self._takes or (origin is None and record["wall"] < QUICK and not shares):
            return
        try:
            places = dict(self._link_in(finished))
        except FileNotFoundError:
            return  # somebody has removed the output already
        except OSError as error:
            self._close_store(error.strerror or str(error))
            return
        if origin is None:
            paths = {entry.path: place for entry, place in places.items()}
            self._waiting.append(Put(key, self._action(finished, tuple(places)), paths))
            self._kept = self._keeper.submit(self._put_what_waits)
        elif origin == HERE:
            self._share(key, anew=False)

    def settle(self) -> None:
        """Wait until everything that was to be kept is in the local store: something that may
        be among it is about to be removed."""
        if self._kept is not None:
            self._kept.result()

    def tell(self) -> None:
        """Print the warnings that have gathered."""
        while self._warnings:
            self._say(f"warning: {self._warnings.pop(0)}")

    def close(self, *, hurry: bool) -> None:
        """Finish what was begun; hurry: forget it."""
        if hurry:
            for each in (self._keeper, self._senders, self._fetchers):
                each.drop()
            self._kept = None
            return
        self.settle()
        left = [future for future in self._sent if not future.done()]
        if left and self._remote is not None:
            self._say(f"sharing with {self._remote.name}")
        for future in left:
            future.result()
        self.tell()

    def _link_in(self, finished: Finished) -> Iterator[tuple[Entry, str]]:
        """The files of a step's outputs and where they are, large ones linked: nobody reads
        them, so none is that was written since it was put in place."""
        for entry, place in files_of(finished, self._folder):
            sound = self._stamps.is_as_put(entry.path, entry.digest)
            if sound and self._store.link_in(place, entry):
                stamp = stamp_of(os.lstat(place))  # a link changes what stat says
                self._stamps.put(entry.path, entry.digest, stamp)
            yield entry, place

    def _action(self, finished: Finished, files: tuple[Entry, ...]) -> Action:
        record = finished.record
        folders = tuple(
            output.path.rstrip("/") + folder.removeprefix(output.staged)
            for output in finished.outputs
            for folder in reversed(output.folders)
        )
        origin: dict[str, Json] = {
            "step": finished.step,
            "qbuild": buildsys.__version__,
            "host": socket.gethostname(),
            "at": record["at"],
        }
        return Action(files, folders, {name: record[name] for name in FACTS}, origin)

    def _put_what_waits(self) -> None:
        """In the keeper's thread: all that waits at once, for the sake of one wait for the disk."""
        waiting = []
        while self._waiting:
            waiting.append(self._waiting.popleft())
        if not waiting or not self._takes:
            return
        try:
            self._store.put(waiting)
        except OSError as error:
            self._close_store(error.strerror or str(error))
            return
        for put in waiting:
            self._share(put.key, anew=True)

    def _share(self, key: str, *, anew: bool) -> None:
        remote, store = self._remote, self._store
        if remote is None or not remote.writes:
            return

        def share() -> bool:
            action = store.action(key)
            return action is not None and remote.share(key, action, anew=anew)

        self._sent.append(self._senders.submit(share))

    def _close_store(self, reason: str) -> None:
        if self._takes:
            self._takes = False
            where = self._store.root
            self._warnings.append(f"the store {where} takes nothing ({reason}); it is left alone")


def ended_as(step: str, action: Action) -> Ended:
    """How the run ended that made an action. Raises BadRecord."""
    facts = action.facts
    try:
        return Ended(
            id=step,
            code=0,
            signal=0,
            timed_out=False,
            over_memory=False,
            error="",
            traceback="",
            notes=dict(facts["notes"]),
            warnings=tuple(map(str, facts["warnings"])),
            wall=float(facts["wall"]),
            cpu=float(facts["cpu"]),
            peak_memory=int(facts["memory"]),
            strays=0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"it does not say how the step ended: {error}") from error


def files_of(finished: Finished, folder: str) -> Iterator[tuple[Entry, str]]:
    """The files of a committed step's outputs, and where they are."""
    for output in finished.outputs:
        for staged in output.files:
            path = output.path.rstrip("/") + staged.removeprefix(output.staged)
            place = f"{folder}/{path}"
            found = os.lstat(place)
            digest = finished.digests[path].removesuffix(EXECUTABLE)
            yield Entry(path, digest, found.st_size, bool(found.st_mode & 0o100)), place
