"""What is put around parts of the engine so that a trace sees what they do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from buildsys.engine.display import Unmoved
from buildsys.engine.executor import Ended, Started
from buildsys.engine.trace import PAUSE
from buildsys.store.local import Store
from buildsys.store.remote import Remote

if TYPE_CHECKING:
    from buildsys.engine.executor import Event, Executor, Order
    from buildsys.engine.failure import Failure
    from buildsys.engine.trace import Trace
    from buildsys.plan.graph import Json
    from buildsys.store.actions import Action, Entry
    from buildsys.store.local import Put

MIB = 1 << 20


class TracedExecutor:
    """An executor whose steps are spans, each in the lowest slot that is free.

    Invariant: `_slots` has the slot and the start of every step that runs.
    """

    def __init__(self, executor: Executor, trace: Trace, steps: TracedSteps) -> None:
        self._executor = executor
        self.elsewhere = executor.elsewhere
        self._trace = trace
        self._steps = steps
        self._submitted: dict[str, int] = {}
        self._slots: dict[str, tuple[int, int]] = {}
        self._until: dict[int, int] = {}  # slot -> the end of its last step

    def submit(self, order: Order) -> None:
        self._submitted[order.id] = self._trace.now()
        self._executor.submit(order)

    def cancel(self, name: str) -> None:
        self._executor.cancel(name)

    def poll(self, timeout: float) -> list[Event]:
        events = self._executor.poll(timeout)
        for event in events:
            if isinstance(event, Started):
                at = self._trace.since_epoch(event.at)
                self._begin(event.id, max(at, self._submitted[event.id]))
            elif isinstance(event, Ended):
                self._end(event.id, event)
        return events

    def close(self) -> None:
        self._executor.close()
        for name in list(self._slots):
            self._end(name, None)

    def _begin(self, name: str, at: int) -> None:
        if name not in self._slots:
            at = min(at, self._trace.now())  # another machine's clock may go ahead
            used = {slot for slot, _ in self._slots.values()}
            free = (
                number
                for number in itertools.count(1)
                if number not in used and self._until.get(number, 0) <= at
            )
            self._slots[name] = (next(free), at)

    def _end(self, name: str, ended: Ended | None) -> None:
        """ended: None for a step that was killed with the executor."""
        submitted = self._submitted.pop(name)
        self._begin(name, submitted)  # one that could not be started has no other beginning
        slot, start = self._slots.pop(name)
        now = self._trace.now()
        end = now if ended is None else max(start, min(start + int(ended.wall * 1e6), now))
        args: dict[str, Json] = {"outcome": "interrupted"}
        if ended is not None:
            args = {"outcome": "ended", "exit code": ended.code, "cpu seconds": ended.cpu}
            args["peak MiB"] = round(ended.peak_memory / MIB, 1)
        self._until[slot] = end
        track = self._trace.slot(slot)
        self._steps.ran(name, self._trace.add(name, "step", track, start, end, args), end)


class TracedSteps(Unmoved):
    """A display that shows nothing: what steps wait for, and what came of them, goes to a trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._began = 0
        self._phases: dict[str, list[tuple[int, str]]] = {}
        self._ran: dict[str, tuple[dict[str, Json], int]] = {}

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        self._began = self._trace.now()

    def ready(self, name: str) -> None:
        now = self._trace.now()
        before = [(self._began, "dependencies")] if now - self._began >= PAUSE else []
        # What it waits for is said where it is not simply its turn among -j.
        self._phases[name] = [*before, (now, "cpu")]

    def waits(self, name: str, for_what: str) -> None:
        phases = self._phases[name]
        if phases[-1][1] != for_what:
            phases.append((self._trace.now(), for_what))

    def started(self, name: str, why: str) -> None:
        self._trace.wait(name, self._phases.pop(name, []), self._trace.now())

    def ran(self, name: str, event: dict[str, Json], end: int) -> None:
        """A step's processes are gone; its span."""
        self._ran[name] = (event, end)

    def committed(self, name: str, record: Mapping[str, Json]) -> None:
        found = self._ran.pop(name, None)
        if found is not None:
            event, end = found
            event["args"] |= {"outcome": "made", "why": record["why"], "key": record["key"]}
            event["args"]["outputs"] = record["outputs"]
            self._trace.wait(name, [(end, "commit")], self._trace.now())

    def failed(self, failure: Failure) -> None:
        found = self._ran.pop(failure.step, None)
        if found is not None:
            found[0]["args"] |= {"outcome": "failed", "error": failure.error}


class TracedStore(Store):
    """The local store; look-ups, what is taken out and what is put in are spans."""

    def __init__(self, root: str, trace: Trace) -> None:
        super().__init__(root)
        self._trace = trace

    def action(self, key: str) -> Action | None:
        with self._trace.span("store", "look up", key=key) as args:
            found = super().action(key)
            args["found"] = found is not None
        return found

    def restore(self, key: str, action: Action, folder: str) -> bool:
        said = {"key": key, "bytes": action.size, "files": len(action.files)}
        with self._trace.span("store", "materialise", **said) as args:
            args["whole"] = super().restore(key, action, folder)
        return bool(args["whole"])

    def link_in(self, path: str, entry: Entry) -> bool:
        with self._trace.span("store", "link in", path=entry.path, bytes=entry.size) as args:
            args["linked"] = super().link_in(path, entry)
        return bool(args["linked"])

    def put(self, puts: Sequence[Put]) -> None:
        size = sum(each.action.size for each in puts)
        with self._trace.span("store", "put", steps=len(puts), bytes=size):
            super().put(puts)


class TracedRemote(Remote):
    """The shared cache; what is fetched and what is sent are spans."""

    def __init__(
        self, url: str, key: bytes | None, store: Store, warn: Callable[[str], None], trace: Trace
    ) -> None:
        super().__init__(url, key, store, warn)
        self._trace = trace

    def fetch(self, key: str, heard: Callable[[], None] = lambda: None) -> Action | None:
        with self._trace.span("shared cache", "fetch", key=key) as args:
            found = super().fetch(key, heard)
            args["found"] = found is not None
        return found

    def share(self, key: str, action: Action, *, anew: bool) -> bool:
        with self._trace.span("shared cache", "share", key=key, bytes=action.size) as args:
            args["sent"] = super().share(key, action, anew=anew)
        return bool(args["sent"])
