"""The local executor: qbuild's end of the socket to the supervisor."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

from buildsys.engine.executor import Ended, Event, Order, Progress, Started
from buildsys.engine.local import interpreter
from buildsys.engine.local.wire import Lines, encode, order_to_json

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

READ_SIZE = 1 << 18
CLOSE_TIMEOUT = 10.0  # seconds; SIGKILL takes milliseconds where no disk hangs


class LocalExecutor:
    """Runs orders on this machine, below a supervisor process that starts with the first one.

    lock_fd: the descriptor that holds the build folder's lock. The supervisor keeps it open
    until its last descendant is gone, also when qbuild is killed.

    Invariant: every submitted order that has not ended is in `_running`.
    """

    elsewhere = False

    def __init__(self, lock_fd: int | None = None) -> None:
        self._lock_fd = lock_fd
        self._running: dict[str, Order] = {}
        self._events: list[Event] = []
        self._lines = Lines()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def supervisor_pid(self) -> int | None:
        """The supervisor's process id; None before the first order."""
        return self._process.pid if self._process else None

    def fileno(self) -> int | None:
        """What becomes readable when `poll` has something; None where no supervisor runs."""
        return None if self._control is None else self._control.fileno()

    def submit(self, order: Order) -> None:
        """Start the order; ValueError where one with its id runs already."""
        if order.id in self._running:
            raise ValueError(f"an order '{order.id}' is already running")
        if self._process is None:
            self._start()
        self._running[order.id] = order
        self._send(["submit", order_to_json(order)])

    def cancel(self, name: str) -> None:
        """Kill the order's process tree; does nothing where it has ended."""
        if name in self._running:
            self._send(["cancel", name])

    def poll(self, timeout: float) -> list[Event]:
        """What has happened since the last call; waits up to `timeout` seconds for anything."""
        deadline = time.monotonic() + timeout
        while not self._events and self._running:
            left = deadline - time.monotonic()
            if not self._receive(max(left, 0.0)) and left <= 0:
                break
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Kill all that runs and wait until it is gone.

        Where a process cannot be killed (a disk hangs), the supervisor goes on waiting for it,
        and keeps the lock as long.
        """
        if self._process is None or self._control is None:
            return
        self._control.close()
        self._running.clear()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            return
        self._process = self._control = None

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        kept = [theirs.fileno()] + ([] if self._lock_fd is None else [self._lock_fd])
        # Without `site` it starts in half the time; it needs the standard library and us.
        arguments = interpreter.command(
            "buildsys.engine.local.supervisor", list(map(str, kept)), flags=("-S", "-E")
        )
        with theirs:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                pass_fds=kept,
                start_new_session=True,  # the terminal's Ctrl-C is for qbuild alone
                cwd="/",
                env={"LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": ""},
            )

    def _send(self, message: Json) -> None:
        assert self._control is not None
        try:
            self._control.sendall(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            self._lost()

    def _receive(self, timeout: float) -> bool:
        """Take what the supervisor sent; did anything come?"""
        assert self._control is not None
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        try:
            data = self._control.recv(READ_SIZE)
        except ConnectionResetError:
            data = b""
        if not data:
            self._lost()
        for kind, *fields in self._lines.feed(data):
            self._take(kind, fields)
        return True

    def _take(self, kind: str, fields: list[Json]) -> None:
        if kind == "Started":
            self._events.append(Started(*fields))
        elif kind == "Progress":
            self._events.append(Progress(*fields))
        else:
            ended = Ended(*fields)
            self._running.pop(ended.id, None)
            self._events.append(ended._replace(warnings=tuple(ended.warnings)))

    def _lost(self) -> None:
        """The supervisor is gone, and every step with it: end all, and start anew when asked."""
        assert self._process is not None
        code = self._process.wait()
        how = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        for name in self._running:
            error = f"the process that supervises the steps ended unexpectedly ({how})"
            self._events.append(Ended(name, 1, 0, False, False, error, "", {}, (), 0.0, 0.0, 0, 0))
        self._running.clear()
        self._process = self._control = None
        self._lines = Lines()
