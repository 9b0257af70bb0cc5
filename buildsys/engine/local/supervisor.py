"""The process that starts every step and ends every step, and outlives a killed qbuild.

It has one thread, so that PR_SET_PDEATHSIG means what it says; it is a subreaper, so that
nothing a step leaves behind escapes it; and it keeps the build folder's lock open until its
last descendant is gone, so that the orphans of a killed qbuild never write beside the next one.
It does what qbuild says over a socket and ends everything when that socket closes.

Programs are run by lanes: processes that it forks of itself, each with a socket to qbuild of its
own and one program at a time, so that whatever is below a lane is of that program. When the
supervisor dies, its lanes end what is below them; when a lane dies, the supervisor does.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from buildsys.engine.executor import Ended, Order, Progress, Started
from buildsys.engine.local import landlock, process_tree
from buildsys.engine.local.ending import how_it_ended, many_threads, refused
from buildsys.engine.local.running_step import RunningStep, kill_quietly
from buildsys.engine.local.spawn import (
    UNCONFINED,
    close_all_but,
    die_with_parent,
    spawn_interpreter,
    spawn_program,
)
from buildsys.engine.local.syscalls import PR_SET_CHILD_SUBREAPER, prctl
from buildsys.engine.local.warm_worker import Kind, WarmWorker, WorkerLost
from buildsys.engine.local.wire import Lines, encode, order_from_json

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

READ_SIZE = 1 << 18
PATIENCE = 0.01  # seconds that Started and Progress may wait for company
MOST_GIVEN = 16  # descriptors in one message; qbuild sends one
WORKER_STARTS = 2  # a worker that dies is started once more; then its steps fail


def main(arguments: list[str]) -> None:
    """arguments: the descriptor of the socket to qbuild; the lock's, if any, is just kept."""
    kept = [int(name) for name in arguments]
    for fd in kept:
        os.set_inheritable(fd, False)
    # A crash would otherwise leave gigabytes of core dump among a step's outputs.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    supervisor = Supervisor(socket.socket(fileno=kept[0]), kept[1:])
    try:
        supervisor.run()
    finally:
        supervisor.end_everything()


def become_lane(parent: int, control: int, kept: Sequence[int]) -> NoReturn:
    """In a fork of the supervisor: begin anew with another socket, and nothing else of it but
    the lock."""
    try:
        signal.set_wakeup_fd(-1)
        close_all_but(control, *kept)
        lane = Supervisor(socket.socket(fileno=control), kept)
        die_with_parent(signal.SIGTERM)  # answered by ending everything
        try:
            if os.getppid() == parent:
                lane.run()
        finally:
            lane.end_everything()
        os._exit(0)
    except BaseException:  # a bug; nothing may return into the code that forked this process
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


class Supervisor:
    """Invariant: every child of this process is a worker, a lane, the process of a step in
    `_steps`, or an orphan: of a step whose own process is gone, or of a lane that is."""

    def __init__(self, control: socket.socket, kept: Sequence[int]) -> None:
        """kept: descriptors that its lanes keep, too."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._control = control
        self._kept = kept
        self._given: deque[int] = deque()
        self._lanes: dict[int, int] = {}
        self._lost_lanes: dict[int, str] = {}
        self._lines = Lines()
        self._out = bytearray()
        self._flush_at = math.inf
        self._steps: dict[int, RunningStep] = {}
        self._ending: list[RunningStep] = []
        self._workers: dict[Kind, WarmWorker] = {}
        self._starts: dict[Kind, int] = {"python": 0, "light": 0}
        self._worker_pids: set[int] = set()
        self._orphans: dict[int, RunningStep | None] = {}
        self._children = process_tree.OwnChildren()
        self._closing = False
        self._ready: dict[int, Callable[[], None]] = {}
        self._poll = select.epoll()
        self._watch(control.fileno(), self._read_control)
        control.setblocking(False)
        self._watch_signals()

    # The loop

    def run(self) -> None:
        """Serve until qbuild's end of the socket is closed."""
        gc.freeze()
        while not self._closing:
            self._wait()
            now = time.monotonic()
            for step in self._steps.values():
                if now >= step.due():
                    step.tick(now)
            self._flush()

    def _wait(self) -> None:
        due = min([step.due() for step in self._steps.values()], default=math.inf)
        due = min(due, self._flush_at)
        timeout = None if due == math.inf else max(due - time.monotonic(), 0)
        found = [(fd, mask, self._ready.get(fd)) for fd, mask in self._poll.poll(timeout)]
        for fd, mask, callback in found:
            if mask & select.EPOLLOUT:
                self._flush_at = 0.0
            # One callback may close a descriptor, and open another that gets its number.
            readable = mask & ~select.EPOLLOUT and self._ready.get(fd) is callback
            if readable and callback is not None:
                callback()

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._ready[fd] = callback
        self._poll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        del self._ready[fd]
        self._poll.unregister(fd)

    def _watch_signals(self) -> None:
        """A signal becomes a byte in a pipe, so that the loop wakes and nothing is interrupted."""
        wake, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # Ctrl-C is qbuild's to answer. It and SIGPIPE are caught rather than ignored because
        # what is ignored stays so in every program that is started.
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, lambda *_: None)
        # Asked to end, this ends everything.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._close)
        self._watch(wake, lambda: self._wake(wake))

    def _wake(self, pipe: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(pipe, READ_SIZE):
                pass
        self._reap()

    def _close(self, *_: object) -> None:
        self._closing = True

    # qbuild's end

    def _read_control(self) -> None:
        try:
            data, given, _, _ = socket.recv_fds(self._control, READ_SIZE, MOST_GIVEN)
        except ConnectionResetError:
            data, given = b"", []
        for fd in given:
            os.set_inheritable(fd, False)  # Python 3.11's recv_fds passes no flags on
        self._given += given
        if not data:
            self._closing = True
        for verb, value in self._lines.feed(data):
            if verb == "submit":
                self._submit(order_from_json(value))
            elif verb == "cancel":
                self._cancel(value)
            elif verb == "lane":
                self._open_lane(value, self._given.popleft())

    def _open_lane(self, number: int, control: int) -> None:
        """Fork a lane; qbuild has the other end of `control`, and calls it by this number."""
        parent = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                become_lane(parent, control, self._kept)
        except OSError as error:
            self._lost_lanes[number] = f"it could not be started: {error.strerror}"
            self._end_steps()
        else:
            self._lanes[pid] = number
        finally:
            os.close(control)

    def _tell(self, event: Started | Progress | Ended) -> None:
        # A short step has ended before word of its start is worth waking qbuild for.
        patience = 0.0 if isinstance(event, Ended) else PATIENCE
        self._say([type(event).__name__, *event], patience)

    def _say(self, message: Json, patience: float = 0.0) -> None:
        self._out += encode(message)
        due = time.monotonic() + patience if patience else 0.0
        self._flush_at = min(due, self._flush_at)

    def _flush(self) -> None:
        """Send what there is; where qbuild does not read, keep the rest and never wait."""
        if not self._out or time.monotonic() < self._flush_at:
            return
        self._flush_at = math.inf
        try:
            del self._out[: self._control.send(self._out)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self._closing = True
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._out else 0)
        self._poll.modify(self._control, wanted)

    # Starting

    def _submit(self, order: Order) -> None:
        if order.argv:
            self._start_program(order)
        elif order.worker == "fresh":
            self._start(order, spawn_interpreter)
        else:
            self._submit_warm(order, order.worker)

    def _start_program(self, order: Order) -> None:
        try:
            pid = spawn_program(order)
        except OSError as error:
            self._tell(refused(order.id, str(error)))
            return
        warnings = () if landlock.abi() else (UNCONFINED,)
        self._steps[pid] = RunningStep(order, pid, None, warnings)
        self._tell(Started(order.id, pid, time.time()))

    def _start(
        self, order: Order, spawn: Callable[[Order, int], int], warnings: tuple[str, ...] = ()
    ) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, False)
        try:
            pid = spawn(order, write)
        except OSError as error:
            os.close(read)
            self._tell(refused(order.id, f"cannot start: {error}"))
            return
        except WorkerLost:
            os.close(read)
            raise
        finally:
            os.close(write)
        step = self._steps[pid] = RunningStep(order, pid, read, warnings)
        self._watch(read, lambda: self._hear(step))
        self._tell(Started(order.id, pid, time.time()))

    def _hear(self, step: RunningStep) -> None:
        for progress in step.read_events():
            self._tell(progress)
        if step.silent and step.events is not None:
            self._forget(step.events)

    def _submit_warm(self, order: Order, kind: Kind) -> None:
        worker = self._workers.get(kind) or self._start_worker(kind)
        if not worker.ready:
            worker.queue.append(order)
        elif worker.threads > 1:
            self._start(order, spawn_interpreter, (many_threads(worker.threads),))
        else:
            try:
                self._start(order, worker.fork)
                self._starts[kind] = 0
            except WorkerLost as lost:
                worker.queue.append(order)
                self._lose(worker, lost)

    def _start_worker(self, kind: Kind) -> WarmWorker:
        worker = self._workers[kind] = WarmWorker(kind)
        self._starts[kind] += 1
        self._worker_pids.add(worker.pid)
        self._watch(worker.channel.fileno(), lambda: self._hear_worker(worker))
        return worker

    def _hear_worker(self, worker: WarmWorker) -> None:
        try:
            worker.receive()
        except WorkerLost as lost:
            self._lose(worker, lost)
            return
        waiting, worker.queue = worker.queue, type(worker.queue)()
        for order in waiting:
            self._submit_warm(order, worker.kind)

    def _lose(self, worker: WarmWorker, lost: WorkerLost) -> None:
        """Start the worker anew for what waits for it, or say why that was not enough."""
        self._forget(worker.channel.fileno())
        worker.end()
        del self._workers[worker.kind]
        if worker.queue and self._starts[worker.kind] < WORKER_STARTS:
            self._start_worker(worker.kind).queue = worker.queue
            return
        self._starts[worker.kind] = 0
        for order in worker.queue:
            self._tell(refused(order.id, str(lost)))

    # Ending

    def _cancel(self, name: str) -> None:
        for worker in self._workers.values():
            for order in [order for order in worker.queue if order.id == name]:
                worker.queue.remove(order)
                self._tell(refused(order.id, "cancelled"))
        for step in self._steps.values():
            if step.order.id == name:
                step.kill("cancel")

    def _reap(self) -> None:
        """Take note of every process that has ended, and of what the steps among them left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            cpu = usage.ru_utime + usage.ru_stime
            if pid in self._steps:
                step = self._steps.pop(pid)
                step.reaped(status, cpu, usage.ru_maxrss * process_tree.KIB)
                self._ending.append(step)
            elif pid in self._orphans:
                owner = self._orphans.pop(pid)
                if owner is not None:
                    owner.cpu += cpu
            elif pid in self._lanes:
                self._lost_lanes[self._lanes.pop(pid)] = how_it_ended(
                    os.waitstatus_to_exitcode(status)
                )
            else:
                self._worker_pids.discard(pid)
        if self._ending or self._lost_lanes:
            self._end_steps()

    def _end_steps(self) -> None:
        """Kill what ended steps left behind, and lanes that died; a step of which nothing is
        left has ended."""
        known = self._steps.keys() | self._worker_pids | self._lanes.keys()
        held: list[RunningStep] = []
        orphans = [pid for pid in self._children() if pid not in known]
        for pid in orphans:
            owners = [step for step in self._ending if step.owns(pid)] or self._ending
            held += owners
            if pid not in self._orphans:
                self._orphans[pid] = owners[0] if owners else None
                for owner in owners[:1]:
                    owner.strays += owner.stop is None
            kill_quietly(pid, signal.SIGKILL)
        for step in [step for step in self._ending if step not in held]:
            self._ending.remove(step)
            self._finish(step)
        if self._lost_lanes and not orphans:
            for number, how in self._lost_lanes.items():
                self._say(["Lost", number, how])
            self._lost_lanes.clear()

    def _finish(self, step: RunningStep) -> None:
        for progress in step.read_events():
            self._tell(progress)
        if step.events is not None:
            if step.events in self._ready:
                self._forget(step.events)
            os.close(step.events)
        self._tell(step.result())

    def end_everything(self) -> None:
        """Kill every descendant and wait until the last one is gone."""
        while True:
            for child in self._children():
                for pid in process_tree.tree(child):
                    kill_quietly(pid, signal.SIGKILL)
            # A dead child's own children are this process's from that moment: look again.
            try:
                os.wait4(-1, 0)
            except ChildProcessError:
                return
