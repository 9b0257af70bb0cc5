"""qbuild's end of a Dask cluster: who works there, and a scheduler of its own where it is told
`dask://local`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from distributed import Client
from distributed import LocalCluster as Scheduler

from buildsys.engine.dask.address import Address
from buildsys.engine.dask.hush import hush
from buildsys.engine.dask.offer import Offer
from buildsys.engine.dask.worker import end_all, make_scratch, published
from buildsys.engine.failure import tail_of
from buildsys.engine.local import interpreter
from buildsys.engine.schedule import Capacity
from buildsys.engine.staging import remove_tree
from buildsys.errors import QbuildError

ANSWER = 10.0  # seconds until a scheduler or a worker is taken to be gone
LOOK = 0.1
ANY = 1000
END = 5.0  # seconds for a worker to end its steps and itself


class Cluster:
    """A client of a scheduler, and the offers of the workers there.

    Invariant: `offers` has, by Dask address, the workers of ours that were there at the last
    `look`; `sharing`, those of them that see the same store, for they have its folder `known`.
    """

    def __init__(self, address: Address, store: str) -> None:
        """Connect; raises QbuildError where nobody answers."""
        hush()
        self.offers: dict[str, Offer] = {}
        self.sharing: set[str] = set()
        self.local: LocalWorkers | None = None
        self._known = ""
        self._closed = False
        self.changed: Callable[[], None] = lambda: None
        self._looked: frozenset[str] = frozenset()
        scheduler = address.scheduler
        if not scheduler:
            self.local = LocalWorkers()
            scheduler = self.local.scheduler
        self.name = scheduler
        try:
            self.client = Client(scheduler, timeout=ANSWER, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise QbuildError(
                f"no scheduler answers at {scheduler}: {error}",
                remedy="start one with `dask scheduler`, or use --executor dask://local",
            ) from error
        self._known = make_scratch(f"{store}/workers")

    def start_workers(
        self, capacities: Sequence[Capacity], licences: Sequence[str], toolchains: Sequence[str]
    ) -> None:
        """Start workers on this machine. licences: that any of them may hold; which step does is
        decided here."""
        assert self.local is not None
        for capacity in capacities:
            self.local.start(capacity, dict.fromkeys(licences, ANY), toolchains)

    def wait_for(self, count: int, seconds: float) -> None:
        """Until there are so many workers of ours. Raises QbuildError."""
        until = time.monotonic() + seconds
        while len(self.look()) < count:
            if self.local is not None:
                self.local.check()
            if time.monotonic() >= until:
                raise QbuildError(
                    f"no qbuild worker is at {self.name}",
                    remedy=f"start one: qbuild worker {self.name.replace('tcp:', 'dask:')}",
                )
            time.sleep(LOOK)

    @property
    def known(self) -> str:
        """A folder in this machine's store, which nobody has who uses another one. It goes with
        this process, at the latest when the next comes."""
        return f"workers/{os.path.basename(self._known)}"

    @property
    def alive(self) -> bool:
        """Is the scheduler still there?"""
        return str(self.client.status) == "running"

    def look(self) -> dict[str, Offer]:
        """The workers as they are now."""
        told: dict[str, Any] = self.client.sync(
            self.client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER
        )
        there = frozenset(told["workers"])
        if there != self._looked:
            answers = self._ask(published, self.known, sorted(there - self.offers.keys()))
            self.offers = {name: each for name, each in self.offers.items() if name in there}
            for name, answer in answers.items():
                if isinstance(answer, list):
                    self.offers[name] = Offer(*answer[0])
                    if answer[1]:
                        self.sharing.add(name)
            self._looked = there
            self.changed()
        return self.offers

    def end(self, prefix: str) -> None:
        """Kill every step that was sent under these tokens, and wait until it is gone."""
        with suppress(TimeoutError, OSError):
            self._ask(end_all, prefix, sorted(self.offers))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._known:
            with suppress(FileNotFoundError):
                remove_tree(self._known)
        with suppress(TimeoutError, OSError):
            self.client.close(timeout=END)
        if self.local is not None:
            self.local.close()

    def _ask(self, question: Callable[..., Any], word: str, workers: list[str]) -> dict[str, Any]:
        if not workers:
            return {}
        answers: dict[str, Any] = self.client.sync(
            self.client._run,  # `run` has no time limit
            question,
            word,
            workers=workers,
            on_error="return",
            callback_timeout=ANSWER,
        )
        return answers


class LocalWorkers:
    """A scheduler in a thread of this process, and worker processes of its own."""

    def __init__(self) -> None:
        self._scheduler = Scheduler(
            n_workers=0, host="127.0.0.1", dashboard_address=None, silence_logs=logging.CRITICAL
        )
        self.scheduler: str = self._scheduler.scheduler_address
        self._folder = tempfile.TemporaryDirectory(prefix="qbuild-workers-")
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def start(
        self, capacity: Capacity, licences: Mapping[str, int], toolchains: Sequence[str]
    ) -> None:
        settings = [self.scheduler, list(capacity), dict(licences), list(toolchains)]
        with open(self._log(len(self._workers)), "wb") as log:
            worker = subprocess.Popen(
                interpreter.command("buildsys.engine.dask.local_worker", [json.dumps(settings)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for qbuild alone
            )
        self._workers.append(worker)

    def check(self) -> None:
        """Raises QbuildError where a worker has ended."""
        for number, worker in enumerate(self._workers):
            if worker.poll() is not None:
                told = "\n".join(tail_of(self._log(number)))
                raise QbuildError(f"a worker of dask://local ended by itself:\n{told}")

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            try:
                worker.wait(END)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        with suppress(TimeoutError, OSError):
            self._scheduler.close(timeout=END)
        self._folder.cleanup()

    def _log(self, number: int) -> str:
        return f"{self._folder.name}/{number}.log"
