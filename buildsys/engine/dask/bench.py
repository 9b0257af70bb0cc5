"""The local executor below an event loop: every step of a worker runs under it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from buildsys.engine.executor import Ended, Order, Progress, Started
from buildsys.engine.local.executor import LocalExecutor

GONE = 5.0  # seconds; SIGKILL takes milliseconds where no disk hangs
Tell = Callable[[Started | Progress], None]


class Bench:
    """Belongs to the thread of the loop. Invariant: an order is in `_waiting` from its start
    until its `Ended` came; while there are any, the loop watches the executor's descriptor."""

    def __init__(self) -> None:
        self._executor = LocalExecutor()
        self._waiting: dict[str, tuple[asyncio.Future[Ended], Tell]] = {}
        self._watched: int | None = None

    async def run(self, order: Order, tell: Tell) -> Ended:
        """Run it; how it ended. If this is cancelled, its processes are killed."""
        future: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._waiting[order.id] = (future, tell)
        self._executor.submit(order)
        self._hear()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.cancel(order.id)
            await asyncio.wait([future], timeout=GONE)
            raise

    def cancel(self, name: str) -> None:
        self._executor.cancel(name)
        self._hear()

    async def gone(self, names: list[str]) -> None:
        """Wait until the last process of these orders is gone."""
        waiting = [self._waiting[name][0] for name in names if name in self._waiting]
        if waiting:
            await asyncio.wait(waiting)

    def close(self) -> None:
        """Kill all that runs."""
        self._watch(None)
        self._executor.close()

    def _hear(self) -> None:
        """Take what the executor has to say, without waiting."""
        for event in self._executor.poll(0.0):
            waiting = self._waiting.get(event.id)
            if waiting is None:
                continue
            future, tell = waiting
            if not isinstance(event, Ended):
                tell(event)
                continue
            del self._waiting[event.id]
            if not future.done():
                future.set_result(event)
        self._watch(self._executor.fileno())

    def _watch(self, fd: int | None) -> None:
        """The descriptor is another one after the supervisor was lost."""
        if fd == self._watched:
            return
        loop = asyncio.get_running_loop()
        if self._watched is not None:
            loop.remove_reader(self._watched)
        if fd is not None:
            loop.add_reader(fd, self._hear)
        self._watched = fd
