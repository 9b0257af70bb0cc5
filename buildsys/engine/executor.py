"""Where steps run: the narrow interface between the engine and whatever runs its steps.

The engine decides what is stale, lays out a staging folder and sends an `Order`; an executor
runs it somewhere and answers with events. Orders and events are plain JSON values, so that
an executor may live in another process or on another machine. Three methods make a back end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from buildsys.engine.schedule import Claim
    from buildsys.plan.graph import Json


class Order(NamedTuple):
    """One step to run.

    id: the step's name, unique within a build.
    module: the rule's module; `make(context)` is called there in a forked worker. Empty where
        `argv` is given: then that program is spawned directly.
    context: the fields of `rules.spec.StepContext` as JSON (paths absolute).
    environment: what is declared. The step sees that and a fixed PATH, LC_ALL, thread counts, HOME
        and TMPDIR (the staging folder), each only where nothing else is declared.
    staging: the working folder, which exists and is empty; all writes belong below it.
    log: file that takes the step's standard output and error (created, appended).
    worker: "python" (torch imported), "light", or "fresh" (a new process, for GPU steps).
    memory_limit: bytes of the whole process tree after which it is killed; None for no limit.
    writable: folders that a confined program may write besides its staging folder.
    claim, priority, parts: what it takes of a machine, how soon it should run (more is sooner),
        and the parts of its action key: for executors that choose a machine.
    """

    id: str
    module: str
    argv: tuple[str, ...]
    context: Mapping[str, Json]
    environment: Mapping[str, str]
    staging: str
    log: str
    worker: Literal["python", "light", "fresh"]
    threads: int
    timeout: float | None
    memory_limit: int | None
    writable: tuple[str, ...] = ()
    claim: Claim | None = None
    priority: float = 0.0
    parts: Mapping[str, Json] = {}  # a Mapping: nobody writes to it


class Started(NamedTuple):
    """The step's process runs. at: seconds since the epoch."""

    id: str
    pid: int
    at: float


class Progress(NamedTuple):
    """How far the step is, in its own unit ("tensors", "layers", "tokens")."""

    id: str
    done: float
    total: float
    unit: str


class Ended(NamedTuple):
    """The step's whole process tree is gone.

    code: exit status; signal: the signal that killed it, or 0. error: the message and
        `traceback` of an exception (empty traceback: a mistake of the user's, shown without).
    notes, warnings: what the rule noted. peak_memory: bytes, of the whole tree. strays: how
        many descendants had to be killed after the step's own process had ended.
    """

    id: str
    code: int
    signal: int
    timed_out: bool
    over_memory: bool
    error: str
    traceback: str
    notes: Mapping[str, Json]
    warnings: tuple[str, ...]
    wall: float
    cpu: float
    peak_memory: int
    strays: int


Event: TypeAlias = Started | Progress | Ended


class Executor(Protocol):
    """Runs orders. Not thread-safe: one thread submits and polls.

    elsewhere: on machines that have toolchains and paths of their own; orders for them name no
    program, for where it runs decides that.
    """

    elsewhere: bool

    def submit(self, order: Order) -> None:
        """Start `order` as soon as possible; its `Ended` event comes from `poll`."""

    def cancel(self, name: str) -> None:
        """Kill the process tree of the order with this id; its `Ended` event still comes."""

    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to `timeout` seconds for the first one."""

    def close(self) -> None:
        """Kill everything that still runs and wait until it is gone."""
