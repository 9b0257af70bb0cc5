"""The supervisor's end of a warm worker: a process that has the heavy imports and forks."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections import deque
from typing import TYPE_CHECKING, Literal

from buildsys.engine.executor import Order
from buildsys.engine.local import interpreter
from buildsys.engine.local.running_step import kill_quietly
from buildsys.engine.local.spawn import spawn_worker
from buildsys.engine.local.wire import Lines, write_order

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

Kind = Literal["python", "light"]
PRELOADED: dict[Kind, str] = {"python": "torch", "light": ""}
FORK_TIMEOUT_MS = 30_000  # a fork takes milliseconds; a worker that takes longer is stuck
TAIL = 2000


class WorkerLost(Exception):
    """The worker died or does not answer; the text says how."""


class WarmWorker:
    """One process that imports once and forks once per step.

    queue: orders that wait for it to be ready. threads: how many it has when ready; with more
    than one a fork may deadlock in the child, so it must not be used.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.queue: deque[Order] = deque()
        self.ready = False
        self.threads = 0
        self._lines = Lines()
        self._output = os.memfd_create("worker-output")
        self.channel, theirs = socket.socketpair()
        with theirs:
            module = "buildsys.engine.local.warm_process"
            arguments = interpreter.command(module, [str(theirs.fileno()), PRELOADED[kind]])
            self.pid = spawn_worker(arguments, self._output, theirs.fileno())

    def receive(self) -> None:
        """Its word that it is ready; WorkerLost at the end of the stream."""
        for message in self._read():
            self.ready = True
            self.threads = message["threads"]

    def fork(self, order: Order, events: int) -> int:
        """A child for this order; its pid. The child is the supervisor's, not the worker's."""
        described = write_order(order)
        try:
            socket.send_fds(self.channel, [b"."], [described, events])
        except OSError as error:
            raise WorkerLost(f"the warm worker is gone ({error})") from error
        finally:
            os.close(described)
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        if not poll.poll(FORK_TIMEOUT_MS):
            raise WorkerLost("the warm worker does not answer")
        (answer,) = self._read()
        if "error" in answer:
            raise OSError(answer["error"])
        return int(answer["pid"])

    def _read(self) -> list[Json]:
        try:
            data = self.channel.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise WorkerLost(f"the warm worker ended unexpectedly{self._tail()}")
        return self._lines.feed(data)

    def _tail(self) -> str:
        size = os.fstat(self._output).st_size
        text = os.pread(self._output, TAIL, max(size - TAIL, 0)).decode(errors="replace").strip()
        return f":\n{text}" if text else ""

    def end(self) -> None:
        """Kill it; its children live on."""
        kill_quietly(self.pid, signal.SIGKILL)
        self.channel.close()
        os.close(self._output)
