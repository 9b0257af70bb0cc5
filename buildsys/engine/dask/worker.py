"""The worker process: a Dask worker that offers what this machine has, and runs steps."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import Worker, WorkerPlugin, get_worker

from buildsys.engine.dask import answer as answers
from buildsys.engine.dask import parcel as parcels
from buildsys.engine.dask.derive import Derivation
from buildsys.engine.dask.desk import Desk
from buildsys.engine.dask.exchange import open_exchange
from buildsys.engine.dask.hush import hush
from buildsys.engine.dask.offer import GIB, offer_here, resources_of
from buildsys.engine.schedule import Capacity
from buildsys.engine.staging import remove_tree
from buildsys.errors import QbuildError
from buildsys.toolchains.definitions import known_names
from buildsys.toolchains.finding import find_toolchains

if TYPE_CHECKING:
    from buildsys.engine.dask.exchange import Exchange
    from buildsys.engine.dask.offer import Offer
    from buildsys.plan.graph import Json

PLUGIN = "qbuild"
TOPIC = "qbuild"  # one for all builds: a scheduler keeps the last thousand events of each topic
PATIENCE = 30.0  # seconds for a first word from the scheduler
GONE = 10.0  # seconds until killed processes are taken to be gone


class Settings(NamedTuple):
    """scheduler: "tcp://..."; licences: name -> how many; toolchains: folders of definitions."""

    scheduler: str
    capacity: Capacity
    licences: Mapping[str, int]
    toolchains: tuple[str, ...]


class Steps(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """Ties the desk to the Dask worker. Invariant: `_running` has the token, which is also the
    Dask key, of every parcel on the desk."""

    name = PLUGIN

    def __init__(self, offer: Offer, exchange: Exchange, derivation: Derivation, scratch: str):
        self.offer = offer
        self._desk = Desk(offer, exchange, derivation, scratch, self._tell)
        self._worker: Any = None
        self._running: set[str] = set()

    def setup(self, worker: Any) -> None:
        self._worker = worker

    def teardown(self, worker: Any) -> None:
        self._desk.bench.close()

    async def run(self, text: str) -> str:
        parcel = parcels.decode(text)
        self._running.add(parcel.token)
        try:
            return answers.encode(await self._desk.take(parcel))
        finally:
            self._running.discard(parcel.token)

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """Dask forgets a task that nobody wants any more; its processes have to be told."""
        if key in self._running and finish in ("cancelled", "released", "forgotten"):
            self._desk.bench.cancel(key)

    async def end(self, prefix: str) -> None:
        """Kill what was sent under these tokens, and wait until it is gone."""
        tokens = [token for token in self._running if token.startswith(prefix)]
        for token in tokens:
            self._desk.bench.cancel(token)
        await asyncio.wait_for(self._desk.bench.gone(tokens), GONE)

    def _tell(self, token: str, event: Json) -> None:
        self._worker.log_event(TOPIC, [token, event])


async def run_parcel(text: str) -> str:
    """The Dask task: one parcel, one answer."""
    steps: Steps = get_worker().plugins[PLUGIN]
    return await steps.run(text)


def published(known: str, dask_worker: Any) -> list[Json] | None:
    """A worker's offer, and whether it sees the same store: does it have `known` there?
    None of a worker that is not ours."""
    steps: Steps | None = dask_worker.plugins.get(PLUGIN)
    if steps is None:
        return None
    return [list(steps.offer), os.path.exists(f"{steps.offer.store}/{known}")]


async def end_all(prefix: str, dask_worker: Any) -> None:
    """Kill all steps of one build on this worker."""
    steps: Steps | None = dask_worker.plugins.get(PLUGIN)
    if steps is not None:
        await steps.end(prefix)


def work(settings: Settings, say: Callable[[str], None]) -> int:
    """Be a worker until a signal comes (its number is returned) or the scheduler is gone (0).

    Raises QbuildError where there is no scheduler, or no store.
    """
    hush()
    exchange = open_exchange(None)
    names = known_names(settings.toolchains)
    found = find_toolchains(names, settings.toolchains, os.environ).found
    fingerprints = {name: each.fingerprint for name, each in found.items()}
    offer = offer_here(settings.capacity, settings.licences, fingerprints, exchange.store.root)
    scratch = make_scratch(f"{offer.store}/workers")
    try:
        derivation = Derivation(settings.toolchains, scratch)
        steps = Steps(offer, exchange, derivation, scratch)
        return asyncio.run(_serve(settings.scheduler, offer, steps, scratch, say))
    finally:
        remove_tree(scratch)


async def _serve(
    scheduler: str, offer: Offer, steps: Steps, scratch: str, say: Callable[[str], None]
) -> int:
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    worker = Worker(
        scheduler,
        nthreads=offer.cpus,
        name=f"qbuild {offer.host} {offer.pid}",
        resources=resources_of(offer),
        plugins=[steps],
        memory_limit=0,  # what steps hold is the supervisor's to watch
        dashboard=False,
        local_directory=scratch,
        death_timeout=PATIENCE,
    )
    try:
        await worker
    except (OSError, TimeoutError) as error:
        raise QbuildError(f"no scheduler answers at {scheduler}: {error}") from error
    say(f"worker at {worker.address}: {described(offer)}")
    gone = asyncio.ensure_future(worker.finished())
    await asyncio.wait({gone, stopped}, return_when=asyncio.FIRST_COMPLETED)
    await worker.close(timeout=GONE)
    return stopped.result() if stopped.done() else 0


def described(offer: Offer) -> str:
    """What a worker has, on one line."""
    parts = [f"{offer.cpus} cpu", f"{offer.memory / GIB:.1f} GiB"]
    parts += [f"{offer.gpus} gpu"] if offer.gpus else []
    parts += [f"licence {name} x {count}" for name, count in offer.licences.items()]
    parts += [f"toolchain {name}" for name in offer.toolchains]
    return ", ".join(parts)


def make_scratch(folder: str) -> str:
    """A folder for this process, locked as long as it lives; what dead ones left is removed."""
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        with suppress(OSError):
            fd = os.open(f"{folder}/{name}/lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(f"{folder}/{name}")
            finally:
                os.close(fd)
    while True:
        own = f"{folder}/{os.uname().nodename}-{os.getpid()}-{os.urandom(3).hex()}"
        os.makedirs(own)
        with suppress(FileNotFoundError):  # somebody took it for a dead one's, before it was locked
            fd = os.open(f"{own}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.stat(f"{own}/lock")
            return own
