"""The local executor: qbuild's end of the sockets to the supervisor and its lanes."""

from __future__ import annotations

import select
import socket
import subprocess
import time
from typing import TYPE_CHECKING

from buildsys.engine.executor import Ended, Event, Order, Progress, Started
from buildsys.engine.local import interpreter
from buildsys.engine.local.ending import how_it_ended, refused
from buildsys.engine.local.wire import Lines, encode, order_to_json

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

READ_SIZE = 1 << 18
CLOSE_TIMEOUT = 10.0  # seconds; SIGKILL takes milliseconds where no disk hangs


class Peer:
    """The supervisor, or one of its lanes. number: the lane's. order: what a lane runs."""

    def __init__(self, socket: socket.socket, number: int | None = None) -> None:
        self.socket = socket
        self.number = number
        self.order: str | None = None
        self._lines = Lines()

    def send(self, message: Json, given: int | None = None) -> bool:
        """Send a message, and a descriptor with it; False where nobody is there any more."""
        data = encode(message)
        try:
            if given is not None:
                data = data[socket.send_fds(self.socket, [data], [given]) :]
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> list[Json] | None:
        """Messages that have come; None at the end of the stream, and after its time is over."""
        try:
            data = self.socket.recv(READ_SIZE)
        except (ConnectionResetError, TimeoutError):
            data = b""
        return self._lines.feed(data) if data else None


class LocalExecutor:
    """Runs orders on this machine, below a supervisor process that starts with the first one.

    lock_fd: the descriptor that holds the build folder's lock. The supervisor keeps it open
    until its last descendant is gone, also when qbuild is killed.

    Invariant: every submitted order that has not ended is in `_running`; one for a program is
    also the `order` of exactly one lane, in `_lanes` while its socket is open, then in `_lost`.
    """

    elsewhere = False

    def __init__(self, lock_fd: int | None = None) -> None:
        self._lock_fd = lock_fd
        self._running: dict[str, Order] = {}
        self._events: list[Event] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Peer | None = None
        self._lanes: dict[int, Peer] = {}
        self._lost: dict[int, Peer] = {}
        self._free: list[Peer] = []
        self._count = 0
        self._poll = select.epoll()

    @property
    def supervisor_pid(self) -> int | None:
        """The supervisor's process id; None before the first order."""
        return self._process.pid if self._process else None

    def fileno(self) -> int | None:
        """What becomes readable when `poll` has something; None where no supervisor runs."""
        return None if self._control is None else self._poll.fileno()

    def submit(self, order: Order) -> None:
        """Start the order; ValueError where one with its id runs already."""
        if order.id in self._running:
            raise ValueError(f"an order '{order.id}' is already running")
        control = self._control or self._start()
        self._running[order.id] = order
        peer = control
        if order.argv:
            peer = self._free.pop() if self._free else self._open_lane(control)
            peer.order = order.id
        # Where nobody is there any more, the end of the stream says so to the next `poll`.
        peer.send(["submit", order_to_json(order)])

    def cancel(self, name: str) -> None:
        """Kill the order's process tree; does nothing where it has ended."""
        if name in self._running and self._control is not None:
            lanes = [lane for lane in self._lanes.values() if lane.order == name]
            for peer in lanes or [self._control]:
                peer.send(["cancel", name])

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
        for peer in (self._control, *self._lanes.values()):
            peer.socket.close()
        self._lanes.clear()
        self._lost.clear()
        self._free.clear()
        self._running.clear()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            return
        self._process = self._control = None

    def _start(self) -> Peer:
        ours, theirs = socket.socketpair()
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
        self._control = Peer(ours)
        self._poll.register(ours, select.EPOLLIN)
        return self._control

    def _open_lane(self, control: Peer) -> Peer:
        """A process that runs programs, one at a time."""
        ours, theirs = socket.socketpair()
        self._count += 1
        lane = self._lanes[ours.fileno()] = Peer(ours, self._count)
        self._poll.register(ours, select.EPOLLIN)
        with theirs:
            control.send(["lane", self._count], theirs.fileno())
        return lane

    def _receive(self, timeout: float) -> bool:
        """Take what was sent; did anything come?"""
        found = self._poll.poll(timeout)
        for fd, _ in found:
            if fd in self._lanes:
                self._hear_lane(self._lanes[fd])
            elif self._control is not None and fd == self._control.socket.fileno():
                self._hear_supervisor(self._control)
        return bool(found)

    def _hear_lane(self, lane: Peer) -> bool:
        """Take what a lane says; False where that was its last word."""
        messages = lane.receive()
        if messages is None:
            assert lane.number is not None  # the supervisor alone has none
            del self._lanes[lane.socket.fileno()]
            lane.socket.close()
            self._lost[lane.number] = lane
            return False
        for kind, *fields in messages:
            if kind == "Ended":
                lane.order = None
                self._free.append(lane)
            self._take(kind, fields)
        return True

    def _hear_supervisor(self, control: Peer) -> None:
        messages = control.receive()
        if messages is None:
            self._supervisor_lost()
            return
        for kind, *fields in messages:
            if kind == "Lost":
                self._lane_lost(*fields)
            else:
                self._take(kind, fields)

    def _take(self, kind: str, fields: list[Json]) -> None:
        if kind == "Started":
            self._events.append(Started(*fields))
        elif kind == "Progress":
            self._events.append(Progress(*fields))
        else:
            ended = Ended(*fields)
            self._running.pop(ended.id, None)
            self._events.append(ended._replace(warnings=tuple(ended.warnings)))

    def _end(self, name: str, how: str) -> None:
        error = f"the process that supervises the steps ended unexpectedly ({how})"
        if self._running.pop(name, None) is not None:
            self._events.append(refused(name, error))

    def _lane_lost(self, number: int, how: str) -> None:
        """A lane is gone, and the supervisor has ended what was below it."""
        for lane in [each for each in self._lanes.values() if each.number == number]:
            while self._hear_lane(lane):
                pass
        lane = self._lost.pop(number)
        if lane in self._free:
            self._free.remove(lane)
        if lane.order is not None:
            self._end(lane.order, how)

    def _supervisor_lost(self) -> None:
        """The supervisor is gone; its lanes go, each when nothing is left below it. End all,
        and start anew when asked."""
        assert self._process is not None
        assert self._control is not None
        self._control.socket.close()
        how = how_it_ended(self._process.wait())
        for lane in list(self._lanes.values()):
            lane.socket.settimeout(CLOSE_TIMEOUT)
            while self._hear_lane(lane):
                pass
        for name in list(self._running):
            self._end(name, how)
        self._lost.clear()
        self._free.clear()
        self._process = self._control = None
