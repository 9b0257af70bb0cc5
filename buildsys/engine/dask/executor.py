"""The Dask executor: one task per step; key in, digests out, artifacts through the exchange.

The scheduler is trusted with nothing: what it loses is sent again or is an error, and what was
finished is in the journal here. Orders leave and answers arrive in threads; one thread submits
and polls, as for every executor.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import KilledWorker

from buildsys.engine.dask import answer as answers
from buildsys.engine.dask import parcel as parcels
from buildsys.engine.dask.desk import failed
from buildsys.engine.dask.offer import cut_to_fit, in_words, lacking, machine_id, needs_of
from buildsys.engine.dask.parcel import Parcel, cargoes_of, handed_key, packed
from buildsys.engine.dask.worker import TOPIC, run_parcel
from buildsys.engine.executor import Ended, Event, Order, Progress, Started
from buildsys.errors import QbuildError

if TYPE_CHECKING:
    from buildsys.engine.dask.answer import Answer
    from buildsys.engine.dask.cluster import Cluster
    from buildsys.engine.dask.exchange import Exchange
    from buildsys.engine.dask.parcel import Cargo
    from buildsys.plan.graph import Json

SENDERS = 8  # threads: they wait for disks and networks
LOOK_EVERY = 1.0  # seconds between looks at who is there
ALONE = 20.0  # seconds that a step may wait for a worker to come back that could run it
TRIES = 4  # times that a step is sent, after refusals and for want of inputs


class SchedulerLost(QbuildError):
    """The scheduler does not answer any more."""


class Flight(NamedTuple):
    """A step under way. future: Dask's, None until it is sent; refusals: worker's address ->
    why; complete: its inputs are in the exchange; alone_since: when it was first seen that no
    worker could run it."""

    order: Order
    token: str
    future: Any = None
    refusals: tuple[tuple[str, str], ...] = ()
    tries: int = 0
    complete: bool = False
    alone_since: float | None = None


class DaskExecutor:
    """Invariant: every submitted order that has not ended is in `_flights`; only the thread that
    polls changes that."""

    elsewhere = True

    def __init__(
        self,
        cluster: Cluster,
        exchange: Exchange,
        digest: Callable[[str], str],
        forced: frozenset[str],
    ) -> None:
        """digest: of a file, by its absolute path; called by several threads. forced: steps that
        run although their outputs may be known."""
        self._cluster = cluster
        self._exchange = exchange
        self._digest = digest
        self._forced = forced
        self._build = f"qbuild-{os.urandom(6).hex()}"
        self._count = 0
        self._flights: dict[str, Flight] = {}
        self._arrived: queue.SimpleQueue[Callable[[], list[Event]]] = queue.SimpleQueue()
        self._senders = ThreadPoolExecutor(SENDERS)
        self._look_at = 0.0
        cluster.client.subscribe_topic(TOPIC, lambda event: self._heard(*event[1]))

    def submit(self, order: Order) -> None:
        if order.id in self._flights:
            raise ValueError(f"an order '{order.id}' is already running")
        with open(order.log, "wb"):
            pass  # what comes of it is appended
        flight = Flight(order, "")
        if self._able(flight):
            self._send(flight)
            return
        self._flights[order.id] = flight
        ended = failed(order.id, self._why_nobody(order))
        self._arrived.put(lambda: self._over(flight, ended))

    def cancel(self, name: str) -> None:
        flight = self._flights.get(name)
        if flight is not None:
            self._cluster.end(flight.token)

    def poll(self, timeout: float) -> list[Event]:
        """Raises SchedulerLost."""
        if not self._cluster.alive:
            raise SchedulerLost(
                f"the scheduler at {self._cluster.name} is gone",
                remedy="what was finished is kept: start a scheduler and its workers, and run "
                "the same command again",
            )
        events: list[Event] = []
        wait = timeout if self._flights else 0.0
        with suppress(queue.Empty):
            events += self._arrived.get(timeout=wait)() if wait else self._arrived.get_nowait()()
            while True:
                events += self._arrived.get_nowait()()
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_EVERY
            events += self._look()
        return events

    def close(self) -> None:
        futures = [flight.future for flight in self._flights.values() if flight.future is not None]
        running = bool(self._flights)
        self._flights.clear()
        self._senders.shutdown(wait=False, cancel_futures=True)
        if self._cluster.alive:
            with suppress(TimeoutError, OSError, CancelledError):
                self._cluster.client.cancel(futures, asynchronous=False)
            if running:
                self._cluster.end(self._build)
        self._senders.shutdown(wait=True)
        self._cluster.close()

    # Out

    def _send(self, flight: Flight) -> None:
        """Send an order, or send it again under another name."""
        self._count += 1
        token = f"{self._build}-{self._count}"
        flight = flight._replace(token=token, tries=flight.tries + 1, future=None)
        self._flights[flight.order.id] = flight
        self._senders.submit(self._dispatch, flight)

    def _dispatch(self, flight: Flight) -> None:
        """In a thread: put what is read where workers get it, and hand the task over."""
        order = flight.order
        try:
            cargoes = cargoes_of(order)
            if flight.complete or not self._all_are_here():
                cargoes = [self._shipped(cargo) for cargo in cargoes]
            text = parcels.encode(self._parcel(flight, tuple(cargoes)))
            future = self._cluster.client.submit(
                run_parcel,
                text,
                key=flight.token,
                pure=False,
                priority=order.priority,
                resources=cut_to_fit(needs_of(order), self._cluster.offers),
                workers=sorted(self._able(flight)) if flight.refusals else None,
            )
        except (OSError, QbuildError) as error:
            why = f"it could not be sent: {error}"
            self._arrived.put(lambda: self._over(flight, failed(order.id, why)))
            return
        self._arrived.put(lambda: self._sent(flight.token, order.id, future))
        future.add_done_callback(lambda done: self._senders_submit(self._receive, flight, done))

    def _senders_submit(self, work: Callable[..., None], *given: Any) -> None:
        with suppress(RuntimeError):  # closed: nobody wants the answer any more
            self._senders.submit(work, *given)

    def _sent(self, token: str, name: str, future: Any) -> list[Event]:
        flight = self._flights.get(name)
        if flight is not None and flight.token == token:
            self._flights[name] = flight._replace(future=future)
        return []

    def _parcel(self, flight: Flight, cargoes: tuple[Cargo, ...]) -> Parcel:
        order = flight.order
        return Parcel(
            token=flight.token,
            step=order.id,
            rule=order.parts["rule"],
            parts=order.parts,
            context=order.context,
            threads=order.threads,
            timeout=order.timeout,
            memory_limit=order.memory_limit,
            cargoes=cargoes,
            machine=machine_id(),
            url=self._exchange.url,
            known=self._cluster.known,
            again=order.id in self._forced,
        )

    def _all_are_here(self) -> bool:
        """Do all workers run under this machine's kernel? Then they read what is here."""
        here = machine_id()
        return all(offer.machine == here for offer in self._cluster.offers.values())

    def _shipped(self, cargo: Cargo) -> Cargo:
        cargo, action, places = packed(cargo, self._digest)
        self._exchange.give(cargo.key, action, places, own=False)
        return cargo

    # In

    def _heard(self, token: str, event: Json) -> None:
        """In a thread of Dask's: an event of a step that runs."""
        self._arrived.put(lambda: self._told(token, event))

    def _told(self, token: str, event: Json) -> list[Event]:
        kind, *fields = event
        flight = next((each for each in self._flights.values() if each.token == token), None)
        if flight is None:
            return []
        if kind == "Log":
            with open(flight.order.log, "a") as log:
                log.write(fields[0])
            return []
        return [Started(*fields) if kind == "Started" else Progress(*fields)]

    def _receive(self, flight: Flight, future: Any) -> None:
        """In a thread: take an answer, and what it says was made."""
        name = flight.order.id
        try:
            answer = answers.decode(future.result())
            ended = self._unpacked(flight, answer)
        except KilledWorker as error:
            count = error.allowed_failures + 1
            ended = failed(name, f"{count} workers died one after another while they ran it")
        except CancelledError:
            return  # by `close`, or the scheduler is lost: `poll` says so
        except Exception as error:  # whatever went wrong on a worker arrives as it was raised there
            ended = failed(name, f"the worker failed: {type(error).__name__}: {error}")
        else:
            self._arrived.put(lambda: self._answered(flight, answer, ended))
            return
        self._arrived.put(lambda: self._over(flight, ended))

    def _unpacked(self, flight: Flight, answer: Answer) -> Ended | None:
        """How it ended; its outputs are then in the staging folder."""
        ended = answer.ended
        if ended is None or ended.code != 0:
            return ended
        order = flight.order
        key = handed_key(order.parts, flight.token)
        try:
            if self._exchange.take(key, order.staging) is not None:
                return ended
            why = "the exchange does not have them; does the worker use the same store, or --cache?"
        except QbuildError as error:
            why = str(error)
        return failed(order.id, f"{answer.worker} made the outputs, but they did not arrive: {why}")

    def _answered(self, flight: Flight, answer: Answer, ended: Ended | None) -> list[Event]:
        if self._is_old(flight):
            return []
        if ended is not None:
            if answer.log:
                with open(flight.order.log, "w") as log:
                    log.write(answer.log)
            return self._over(flight, ended)
        if answer.kind == "missing" and not flight.complete:
            self._send(flight._replace(complete=True))
            return []
        if answer.kind == "missing":
            why = f"{answer.worker} does not find {', '.join(answer.places)} in the exchange"
            return self._over(flight, failed(flight.order.id, why))
        return self._refused(flight, answer)

    def _refused(self, flight: Flight, answer: Answer) -> list[Event]:
        """Somebody else may be able to make it."""
        address = next(
            (name for name, each in self._cluster.offers.items() if each.name == answer.worker),
            answer.worker,
        )
        flight = flight._replace(refusals=(*flight.refusals, (address, answer.why)))
        if self._able(flight) and flight.tries < TRIES:
            self._send(flight)
            return []
        why = [f"{answer.worker} refuses it: {answer.why}"]
        if len(flight.refusals) > 1:
            why.append(f"so do {len(flight.refusals) - 1} more")
        return self._over(flight, failed(flight.order.id, "; ".join(why)))

    def _over(self, flight: Flight, ended: Ended) -> list[Event]:
        if self._is_old(flight):
            return []
        del self._flights[flight.order.id]
        return [ended]

    def _is_old(self, flight: Flight) -> bool:
        """Was it sent again meanwhile, or given up?"""
        now = self._flights.get(flight.order.id)
        return now is None or now.token != flight.token

    # Who is there

    def _look(self) -> list[Event]:
        """End the steps that no worker could run, after a while."""
        with suppress(TimeoutError, OSError):
            self._cluster.look()
        events: list[Event] = []
        now = time.monotonic()
        for name, flight in list(self._flights.items()):
            since = None if self._able(flight) else flight.alone_since or now
            if since is not None and now - since >= ALONE:
                events += self._over(flight, failed(name, self._why_nobody(flight.order)))
            else:
                self._flights[name] = flight._replace(alone_since=since)
        return events

    def _able(self, flight: Flight) -> set[str]:
        """The workers that could run it, if nothing else ran there."""
        refused = dict(flight.refusals)
        offers = {name: each for name, each in self._cluster.offers.items() if name not in refused}
        needs = cut_to_fit(needs_of(flight.order), offers)
        return {name for name, offer in offers.items() if not lacking(needs, offer)}

    def _why_nobody(self, order: Order) -> str:
        offers = self._cluster.offers
        needs = cut_to_fit(needs_of(order), offers)
        if not offers:
            return f"no worker is left at {self._cluster.name}; finished steps are kept"
        lines = [
            f"{offer.name} lacks {', '.join(in_words(n, needs[n], offer) for n in lack)}"
            for offer in offers.values()
            if (lack := lacking(needs, offer))
        ]
        return "no worker can run it: " + "; ".join(lines)
