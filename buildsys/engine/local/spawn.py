"""From an order to a running process: in a session of its own, confined, with a clean slate.

A program is started by posix_spawn(3), which copies nothing of this process; forking it would be
most of what a short step costs. Landlock holds for the thread that asks for it and for what that
thread starts, so the program's is asked for in a thread that does nothing else and ends.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

from buildsys.engine.executor import Order
from buildsys.engine.local import interpreter, landlock
from buildsys.engine.local.syscalls import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from buildsys.engine.local.wire import encode, write_order

UNCONFINED = "unconfined: this kernel has no Landlock, so the program may write anywhere"
CANNOT_RUN = 127
SIGNALS = signal.valid_signals()
STANDARD_ERROR = 2  # the last of the three descriptors that every process has


def spawn_program(order: Order) -> int:
    """Start the order's program directly; its pid. This process moves to the step's folder.

    OSError, for people, where the program cannot be run or its folder cannot be prepared.
    """
    environment = environment_of(order)
    try:
        program = find_program(order.argv[0], environment["PATH"])
        os.chdir(order.staging)
        log = open_log(order)
    except OSError as error:
        raise OSError(f"cannot start: {error}") from error

    def start() -> int:
        if landlock.abi():
            landlock.confine((order.staging, *order.writable))
        return os.posix_spawn(
            program,
            order.argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, log, each) for each in (1, 2)],
            setsid=True,
            # What this process ignores or blocks, the program would too: Python ignores SIGXFSZ,
            # and a shell has what it runs in the background ignore SIGQUIT.
            setsigdef=SIGNALS,
            setsigmask=(),
        )

    try:
        return in_own_thread(start)
    except OSError as error:
        raise OSError(f"cannot run '{order.argv[0]}': {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # what no system call takes; no thread to be had
        raise OSError(f"cannot run '{order.argv[0]}': {error}") from error
    finally:
        os.close(log)


def in_own_thread(work: Callable[[], int]) -> int:
    """What `work` returns, or an OSError that it raises, from a thread that ends with it."""
    made: list[int] = []
    failed: list[BaseException] = []
    over = _thread.allocate_lock()

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:  # raised again in the thread that waits
            failed.append(error)
        over.release()

    over.acquire()
    _thread.start_new_thread(run, ())  # a quarter of what threading.Thread costs
    over.acquire()
    if failed:
        raise failed[0]
    return made[0]


def spawn_interpreter(order: Order, events: int) -> int:
    """Start a new interpreter that runs the order's rule; its pid."""
    described = write_order(order)
    module = "buildsys.engine.local.step_main"
    arguments = interpreter.command(module, [str(described), str(events)])
    environment = {**interpreter.base_environment(order.threads), **interpreter.OFFLINE}

    def execute() -> None:
        os.set_inheritable(described, True)
        os.set_inheritable(events, True)
        die_with_parent()
        os.execve(arguments[0], arguments, environment)

    try:
        return _fork(execute, events, arguments[0])
    finally:
        os.close(described)


def spawn_worker(arguments: list[str], output: int, kept: int) -> int:
    """Start a warm worker: one thread for every library, so that it can fork."""
    environment = {**interpreter.base_environment(1), **interpreter.OFFLINE}

    def execute() -> None:
        os.setsid()
        die_with_parent()
        redirect_output(output)
        os.set_inheritable(kept, True)
        os.execve(arguments[0], arguments, environment)

    return _fork(execute, output, arguments[0])


def _fork(execute: Callable[[], None], report: int, program: str) -> int:
    pid = os.fork()
    if pid == 0:
        _become(execute, report, program)
    return pid


def _become(execute: Callable[[], None], report: int, program: str) -> NoReturn:
    # Nothing may escape: an exception would run the supervisor's own clean-up in its child.
    try:
        execute()
    except OSError as error:
        os.write(report, encode(["failed", f"cannot run '{program}': {error.strerror}"]))
    finally:
        os._exit(CANNOT_RUN)


def find_program(name: str, path: str) -> str:
    """The file that a program's name stands for; one with a "/" is taken as it is."""
    if "/" in name:
        return name
    found = _in_path(name, path)
    if not os.access(found, os.X_OK):  # it has gone since it was last run
        _in_path.cache_clear()
        found = _in_path(name, path)
    return found


@lru_cache(64)
def _in_path(name: str, path: str) -> str:
    for folder in path.split(":"):
        if os.access(f"{folder}/{name}", os.X_OK) and os.path.isfile(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise OSError(f"there is no program '{name}' in PATH ({path})")


def open_log(order: Order) -> int:
    """A descriptor of the step's log, which is made where there is none."""
    return os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def enter_step(staging: str, log: int) -> None:
    """Make this process the root of the step's tree: own session, own output, own folder."""
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent()
    os.chdir(staging)
    redirect_output(log)


def redirect_output(fd: int) -> None:
    """Standard output and error go to `fd`. Standard input is /dev/null in every process
    below the supervisor, as it is there."""
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def close_all_but(*kept: int) -> None:
    """Close every descriptor but standard input, output and error, and these."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > STANDARD_ERROR and fd not in kept:
            with contextlib.suppress(OSError):  # the one that lists them is closed by now
                os.close(fd)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Get this signal when the parent dies. Sound only because the supervisor has one thread:
    the signal comes when the thread that forked ends, not the process."""
    prctl(PR_SET_PDEATHSIG, number)


def environment_of(order: Order) -> dict[str, str]:
    """The whole environment of the order's process."""
    return interpreter.step_environment(dict(order.environment), order.staging, order.threads)
