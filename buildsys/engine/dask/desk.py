"""A worker's desk: a parcel comes in, the step runs as the local executor runs it, its outputs
go into the exchange, and the answer says how it went."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import buildsys
from buildsys.engine.dask import parcel as parcels
from buildsys.engine.dask.answer import Answer
from buildsys.engine.dask.bench import Bench
from buildsys.engine.dask.exchange import Exchange, open_exchange
from buildsys.engine.digest import EXECUTABLE
from buildsys.engine.executor import Ended, Order, Progress, Started
from buildsys.engine.keeping import stamps_below
from buildsys.engine.key import key_digest
from buildsys.engine.ordering import program_of
from buildsys.engine.staging import (
    Output,
    Staging,
    collect,
    digest_output,
    remove_tree,
)
from buildsys.engine.storing import ended_as
from buildsys.errors import QbuildError
from buildsys.store.actions import Action, BadRecord, Entry

if TYPE_CHECKING:
    from buildsys.engine.blueprint import RuleFacts
    from buildsys.engine.dask.derive import Derivation
    from buildsys.engine.dask.offer import Offer
    from buildsys.engine.dask.parcel import Parcel
    from buildsys.plan.graph import Json

LOG_PIECE = 1 << 12  # bytes of a log that travel at a time while a step runs
LOG_EVERY = 0.5  # seconds
LOG_MOST = 1 << 20  # bytes of a log that travel at the end: its first and its last half
Tell = Callable[[str, "Json"], None]


class Missing(Exception):
    """Inputs that are not in the exchange; args: their places."""


class Desk:
    """Belongs to the thread of the worker's event loop; what takes long goes to other threads.

    tell: sends an event of the parcel with a token. scratch: the folder that everything is done in.
    """

    def __init__(
        self, offer: Offer, exchange: Exchange, derivation: Derivation, scratch: str, tell: Tell
    ) -> None:
        self._offer = offer
        self._exchanges: dict[str | None, Exchange] = {None: exchange}
        self._derivation = derivation
        self._scratch = scratch
        self._tell = tell
        self.bench = Bench()

    async def take(self, parcel: Parcel) -> Answer:
        """Make what a parcel asks for."""
        worker, store = self._offer.name, self._offer.store
        if parcel.url is None and not os.path.exists(f"{store}/{parcel.known}"):
            why = f"it uses another store ({store}), and there is no --cache to exchange artifacts"
            return Answer("refused", worker, why=why)
        facts = self._derivation.facts(parcel.rule)
        if facts is None:
            return Answer("refused", worker, why=f"it has no rule '{parcel.rule}'")
        objections = self._derivation.objections(facts, parcel.parts)
        if objections:
            return Answer("refused", worker, why="; ".join(objections))
        with self._room(parcel.token) as room:
            try:
                ended, log = await self._make(parcel, facts, room)
            except Missing as missing:
                return Answer("missing", worker, places=missing.args)
            except QbuildError as error:
                ended, log = failed(parcel.step, str(error)), read_log(f"{room}/log")
        return Answer("ended", worker, ended, log)

    async def _make(self, parcel: Parcel, facts: RuleFacts, room: str) -> tuple[Ended, str]:
        exchange = self._exchange(parcel.url)
        handed = parcels.handed_key(parcel.parts, parcel.token)
        folders = Staging(f"{room}/out")
        staging = folders.fresh(parcel.parts["outputs"].values())
        if not parcel.again:
            # Another worker may have made it, and died before it could say so.
            action = await asyncio.to_thread(exchange.take, handed, staging)
            if action is not None:
                with suppress(BadRecord):
                    return ended_as(parcel.step, action), ""
            folders.discard(staging)
            staging = folders.fresh(parcel.parts["outputs"].values())
        places = await asyncio.to_thread(self._unpack, parcel, exchange, f"{room}/in")
        order = self._order(parcel, facts, places, staging, room)
        ended = await self._run(order, parcel)
        log = read_log(order.log)
        if ended.code != 0:
            return ended, log
        objections = self._derivation.objections(facts, parcel.parts)
        if objections:
            why = f"while it ran, something changed on {self._offer.name}: {'; '.join(objections)}"
            return failed(parcel.step, why), log
        await asyncio.to_thread(self._hand_over, parcel, exchange, ended, staging, handed)
        if "kept" in order.context:
            remove_tree(os.path.dirname(order.context["kept"]))
        return ended, log

    @contextmanager
    def _room(self, token: str) -> Iterator[str]:
        """A folder for one parcel, gone afterwards."""
        room = f"{self._scratch}/{token}"
        os.makedirs(room)
        try:
            yield room
        finally:
            remove_tree(room)

    def _exchange(self, url: str | None) -> Exchange:
        if url not in self._exchanges:
            self._exchanges[url] = open_exchange(url)
        return self._exchanges[url]

    def _unpack(self, parcel: Parcel, exchange: Exchange, folder: str) -> dict[str, str]:
        """Where each input is here: in its own place where this machine has the same file under
        the same name, else copied or linked from the exchange. Raises Missing."""
        same = parcel.machine == self._offer.machine
        places: dict[str, str] = {}
        missing = []
        for number, cargo in enumerate(parcel.cargoes):
            if same and cargo.is_here:
                places[cargo.place] = cargo.place
                continue
            # Under its own name, for some rules tell by it what it is.
            place = f"{folder}/{number}/{os.path.basename(cargo.place)}"
            into = place if cargo.folder else os.path.dirname(place)
            os.makedirs(into)
            if cargo.key and exchange.take(cargo.key, into) is not None:
                places[cargo.place] = place
            else:
                missing.append(cargo.place)
        if missing:
            raise Missing(*missing)
        return places

    def _order(
        self,
        parcel: Parcel,
        facts: RuleFacts,
        places: dict[str, str],
        staging: str,
        room: str,
    ) -> Order:
        """The order as this machine would have made it. Raises StepError."""
        parts = parcel.parts
        outputs = {name: f"{staging}/{path.rstrip('/')}" for name, path in parts["outputs"].items()}
        toolchain = {}
        for name in parts["toolchain"]:
            toolchain = dict(self._derivation.fields(name))
        context = parcels.moved(parcel.context, places, facts.templates)
        context |= {"outputs": outputs, "toolchain": toolchain}
        if facts.resumable:
            context["kept"] = self._kept(key_digest(parts), places)
        argv, environment = program_of(facts.module, context, dict(parts["environment"]))
        return Order(
            id=parcel.token,
            module="" if argv else facts.module,
            argv=argv,
            context=context,
            environment=environment,
            staging=staging,
            log=f"{room}/log",
            worker="fresh" if parts["device"] != "cpu" else facts.worker,  # type: ignore[arg-type]  # one of the three words
            threads=parcel.threads,
            timeout=parcel.timeout,
            memory_limit=parcel.memory_limit,
        )

    def _kept(self, key: str, places: Mapping[str, str]) -> str:
        """Where a resumable step keeps its work for another attempt on this worker. As on the
        machine of the build, it counts only if what is read in its own place was not touched
        since: it may have been edited meanwhile, and put back."""
        stamps = stamps_below(place for place, here in sorted(places.items()) if place == here)
        own, name = f"{self._scratch}/kept-{key}", key_digest({"stamps": stamps})
        os.makedirs(f"{own}/{name}", exist_ok=True)
        for other in os.listdir(own):
            if other != name:
                remove_tree(f"{own}/{other}")
        return f"{own}/{name}"

    async def _run(self, order: Order, parcel: Parcel) -> Ended:
        def tell(event: Started | Progress) -> None:
            self._tell(parcel.token, [type(event).__name__, *event._replace(id=parcel.step)])

        tail = asyncio.create_task(self._tell_log(order.log, parcel.token))
        try:
            ended = await self.bench.run(order, tell)
        finally:
            tail.cancel()
        return ended._replace(id=parcel.step)

    async def _tell_log(self, log: str, token: str) -> None:
        """Send what a step prints while it runs, as far as a person could read it."""
        at = 0
        while True:
            await asyncio.sleep(LOG_EVERY)
            with suppress(FileNotFoundError), open(log, "rb") as file:
                file.seek(at)
                data = file.read(LOG_PIECE)
                at += len(data)
                if data:
                    self._tell(token, ["Log", data.decode(errors="replace")])

    def _hand_over(
        self, parcel: Parcel, exchange: Exchange, ended: Ended, staging: str, key: str
    ) -> None:
        """Give the outputs to the exchange. Raises UnfitOutput, ExchangeError."""
        outputs = collect(staging, parcel.parts["outputs"].values())
        files = tuple(_entries(outputs, staging))
        folders = tuple(
            output.path.rstrip("/") + folder.removeprefix(output.staged)
            for output in outputs
            for folder in reversed(output.folders)
        )
        facts: dict[str, Json] = {
            "wall": round(ended.wall, 4),
            "cpu": round(ended.cpu, 4),
            "memory": ended.peak_memory,
            "notes": dict(ended.notes),
            "warnings": list(ended.warnings),
        }
        origin: dict[str, Json] = {
            "step": parcel.step,
            "qbuild": buildsys.__version__,
            "host": socket.gethostname(),
            "at": round(time.time(), 3),
        }
        places = {entry.path: f"{staging}/{entry.path}" for entry in files}
        exchange.give(key, Action(files, folders, facts, origin), places, own=True)


def _entries(outputs: list[Output], staging: str) -> Iterator[Entry]:
    for output in outputs:
        digests = digest_output(output)
        for staged in output.files:
            path = staged.removeprefix(f"{staging}/")
            found = os.lstat(staged)
            digest = digests[path].removesuffix(EXECUTABLE)
            yield Entry(path, digest, found.st_size, bool(found.st_mode & 0o100))


def failed(step: str, error: str) -> Ended:
    """How a step ended that failed for something other than its own process."""
    return Ended(step, 1, 0, False, False, error, "", {}, (), 0.0, 0.0, 0, 0)


def read_log(path: str) -> str:
    """A log as it travels: of a very long one the beginning and the end."""
    try:
        with open(path, "rb") as file:
            data = file.read(LOG_MOST // 2)
            size = os.fstat(file.fileno()).st_size
            left = size - len(data)
            if left > LOG_MOST // 2:
                data += f"\n[{left - LOG_MOST // 2} bytes left out]\n".encode()
                file.seek(-LOG_MOST // 2, os.SEEK_END)
            return (data + file.read()).decode(errors="replace")
    except FileNotFoundError:
        return ""
