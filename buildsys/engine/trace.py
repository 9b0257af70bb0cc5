"""A trace of a build for Perfetto (ui.perfetto.dev) or chrome://tracing: who did what, when.

Chrome's trace-event format, JSON object form: `ph` "X" for a span (ts and dur in microseconds),
"b"/"e" for a wait (many at once, so not on a thread's track), "M" for the names of tracks.
Three groups: qbuild's own threads, the steps by the worker slot that they ran in, and what
each step waited for. Imported only where a trace is asked for.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from buildsys.errors import QbuildError

if TYPE_CHECKING:
    from buildsys.engine.project import Scene
    from buildsys.plan.graph import Json

OWN, STEPS, WAITS = 1, 2, 3  # the groups: what the format calls a process
FIRST = 1000  # of a group's tracks: Perfetto tells threads by `tid` alone, and 0 is the idle one
GROUPS = {OWN: "qbuild", STEPS: "steps", WAITS: "waiting"}
ENGINE = (OWN, OWN * FIRST)
PAUSE = 1000  # microseconds; a shorter wait is none
# A point of the engine -> what was done until then, since the point before it.
STAGES = {
    "locked": ("planning", "take the lock"),
    "models fetched": ("planning", "models of the hub"),
    "surveyed": ("planning", "look at the journal and the machine"),
    "judged": ("planning", "judge what is stale"),
    "intent written": ("commit", "check again, write the intents"),
    "intent durable": ("commit", "fsync: outputs and intents"),
    "done written": ("commit", "rename, write the journal"),
    "done durable": ("commit", "fsync: folders and journal"),
}


class Trace:
    """What has happened so far. Any thread may add to it.

    Invariant: every event is one of the format's; spans of one track do not overlap but by
    nesting, for a track is one thread, or one slot that holds one step at a time.
    """

    def __init__(
        self,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        epoch: Callable[[], float] = time.time,
    ) -> None:
        self._clock_ns = clock_ns
        self._began_ns = clock_ns()
        self._epoch = epoch()
        self._events: list[dict[str, Json]] = []
        self._names: dict[tuple[int, int], str] = {}
        self._threads: dict[int, int] = {threading.get_ident(): ENGINE[1]}
        self._names[ENGINE] = "engine"
        self._mark = self._commit_began = 0

    def now(self) -> int:
        """Microseconds since the trace began."""
        return (self._clock_ns() - self._began_ns) // 1000

    def since_epoch(self, seconds: float) -> int:
        """A time of day on the trace's clock."""
        return int((seconds - self._epoch) * 1e6)

    def add(
        self,
        name: str,
        kind: str,
        track: tuple[int, int],
        start: int,
        end: int,
        args: Mapping[str, Json],
    ) -> dict[str, Json]:
        """A span; the event, to whose args more may be added until the trace is written."""
        group, number = track
        event: dict[str, Json] = {"name": name, "cat": kind, "ph": "X", "ts": start}
        event |= {"dur": max(end - start, 0), "pid": group, "tid": number, "args": dict(args)}
        self._events.append(event)
        return event

    def slot(self, number: int) -> tuple[int, int]:
        """The track of a worker slot."""
        track = (STEPS, STEPS * FIRST + number)
        self._names.setdefault(track, f"worker {number}")
        return track

    @contextmanager
    def span(self, kind: str, name: str, **args: Json) -> Iterator[dict[str, Json]]:
        """What this thread does while this lasts; yields the args."""
        start = self.now()
        try:
            yield args
        finally:
            self.add(name, kind, self._thread(kind), start, self.now(), args)

    def wait(self, step: str, phases: list[tuple[int, str]], end: int) -> None:
        """What a step waited for: phases as (from, for what), one after the other, until `end`."""
        if not phases or end - phases[0][0] < PAUSE:
            return
        self._edge(step, step, "b", phases[0][0])
        for (start, what), stop in zip(phases, [*(p[0] for p in phases[1:]), end], strict=True):
            if stop > start:
                self._edge(step, what, "b", start)
                self._edge(step, what, "e", stop)
        self._edge(step, step, "e", end)

    def at(self, point: str) -> None:
        """The engine has come to a point; see `STAGES`."""
        now = self.now()
        if point == "commit":
            self._mark = self._commit_began = now
        elif point in STAGES:
            kind, name = STAGES[point]
            self.add(name, kind, ENGINE, self._mark, now, {})
            self._mark = now
        if point == "done durable":
            self.add("commit", "commit", ENGINE, self._commit_began, now, {})

    def mark(self) -> None:
        """What follows is not part of what was before."""
        self._mark = self.now()

    def watch(self, scene: Scene) -> None:
        """From now on, every file that is hashed is a span."""
        scene.stamps.hash_one = self.watched(scene.stamps.hash_one)

    def watched(self, hash_one: Callable[[str], str]) -> Callable[[str], str]:
        def hash_and_tell(path: str) -> str:
            with self.span("hashing", f"hash {os.path.basename(path)}", path=path) as args:
                args["bytes"] = os.stat(path).st_size
                return hash_one(path)

        return hash_and_tell

    def write(self, path: str) -> None:
        """Write the file, whole or not at all. Raises QbuildError where that cannot be."""
        content = {"traceEvents": [*self._metadata(), *sorted(self._events, key=_order)]}
        temporary = f"{path}.{os.getpid()}"
        try:
            with open(temporary, "w") as file:
                json.dump(content, file, separators=(",", ":"))
            os.replace(temporary, path)
        except OSError as error:
            raise cannot_write(path, error) from error

    def _edge(self, step: str, name: str, phase: str, at: int) -> None:
        event: dict[str, Json] = {"name": name, "cat": "wait", "ph": phase, "ts": at}
        self._events.append({**event, "pid": WAITS, "tid": WAITS * FIRST, "id": step, "args": {}})

    def _thread(self, kind: str) -> tuple[int, int]:
        """The track of the thread that asks; it is named after the first thing that it does."""
        ident = threading.get_ident()
        if ident not in self._threads:
            count = len(self._threads)
            number = self._threads[ident] = OWN * FIRST + count
            self._names[OWN, number] = f"{kind} {count}"
        return OWN, self._threads[ident]

    def _metadata(self) -> Iterator[dict[str, Json]]:
        def named(kind: str, group: int, number: int, key: str, value: Json) -> dict[str, Json]:
            head: dict[str, Json] = {"name": kind, "ph": "M", "ts": 0, "pid": group, "tid": number}
            return {**head, "args": {key: value}}

        for group, name in GROUPS.items():
            yield named("process_name", group, group * FIRST, "name", name)
            yield named("process_sort_index", group, group * FIRST, "sort_index", group)
        for (group, number), name in list(self._names.items()):
            yield named("thread_name", group, number, "name", name)
            yield named("thread_sort_index", group, number, "sort_index", number)


def _order(event: Mapping[str, Json]) -> tuple[int, int, int]:
    """By time; a span before those that it encloses, an end before what begins then."""
    last = {"e": 0, "X": 1, "b": 1}[event["ph"]]
    return event["ts"], last, -event.get("dur", 0)


def cannot_write(path: str, error: OSError) -> QbuildError:
    return QbuildError(
        f"the trace {path} cannot be written: {error.strerror}", remedy="give --trace another file"
    )


def check_place(path: str) -> None:
    """QbuildError where a trace could not be written in the end: better now than after hours."""
    try:
        with open(f"{path}.{os.getpid()}", "w"):
            pass
        os.unlink(f"{path}.{os.getpid()}")
    except OSError as error:
        raise cannot_write(path, error) from error
    if os.path.isdir(path):
        raise QbuildError(f"the trace {path} cannot be written: it is a folder")
