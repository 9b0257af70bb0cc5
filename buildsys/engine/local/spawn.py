"""From an order to a running process: in a session of its own, confined, with a clean slate."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from typing import NoReturn

from buildsys.engine.executor import Order
from buildsys.engine.local import interpreter, landlock
from buildsys.engine.local.syscalls import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from buildsys.engine.local.wire import encode, write_order

UNCONFINED = "unconfined: this kernel has no Landlock, so the program may write anywhere"
CANNOT_RUN = 127


def spawn_program(order: Order, events: int) -> int:
    """Start the order's program directly; its pid. `events` takes word of a failed start."""
    confined = landlock.abi() > 0

    def execute() -> None:
        enter_step(order)
        if confined:
            landlock.confine((order.staging, *order.writable))
        try:
            os.execvpe(order.argv[0], order.argv, environment_of(order))
        except OSError as error:
            os.write(events, encode(["failed", _cannot_run(order, error)]))

    return _fork(execute, lambda error: os.write(events, encode(["failed", _unprepared(error)])))


def spawn_interpreter(order: Order, events: int) -> int:
    """Start a new interpreter that runs the order's rule; its pid."""
    described = write_order(order)
    arguments = interpreter.command(
        "buildsys.engine.local.step_main", [str(described), str(events)]
    )

    def execute() -> None:
        os.set_inheritable(described, True)
        os.set_inheritable(events, True)
        die_with_parent()
        os.execve(arguments[0], arguments, interpreter.base_environment(order.threads))

    try:
        return _fork(
            execute, lambda error: os.write(events, encode(["failed", _unprepared(error)]))
        )
    finally:
        os.close(described)


def spawn_worker(arguments: list[str], output: int, kept: tuple[int, ...]) -> int:
    """Start a warm worker: one thread for every library, so that it can fork."""

    def execute() -> None:
        os.setsid()
        die_with_parent()
        replace_streams(output)
        for fd in kept:
            os.set_inheritable(fd, True)
        environment = {**interpreter.base_environment(1), **interpreter.OFFLINE}
        os.execve(arguments[0], arguments, environment)

    return _fork(execute, lambda error: os.write(output, str(error).encode()))


def _fork(execute: Callable[[], None], report: Callable[[OSError], object]) -> int:
    pid = os.fork()
    if pid == 0:
        _become(execute, report)
    return pid


def _become(execute: Callable[[], None], report: Callable[[OSError], object]) -> NoReturn:
    # Nothing may escape: an exception would run the supervisor's own clean-up in its child.
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        execute()
    except OSError as error:
        report(error)
    finally:
        os._exit(CANNOT_RUN)


def enter_step(order: Order) -> None:
    """Make this process the root of the step's tree: own session, own streams, own folder."""
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent()
    # A crash would otherwise leave gigabytes of core dump among the outputs.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.chdir(order.staging)
    for name in (interpreter.HOME, interpreter.TEMPORARY):
        os.makedirs(name, exist_ok=True)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    replace_streams(log)
    os.close(log)


def replace_streams(output: int) -> None:
    """Standard input is empty; output and error go to `output`."""
    empty = os.open("/dev/null", os.O_RDONLY)
    for fd, target in ((empty, 0), (output, 1), (output, 2)):
        os.dup2(fd, target, inheritable=True)
    os.close(empty)


def die_with_parent() -> None:
    """Be killed when the parent dies. Sound only because the supervisor has one thread: the
    signal comes when the thread that forked ends, not the process."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment_of(order: Order) -> dict[str, str]:
    """The whole environment of the order's process."""
    return interpreter.step_environment(dict(order.environment), order.staging, order.threads)


def _cannot_run(order: Order, error: OSError) -> str:
    program = order.argv[0]
    if isinstance(error, FileNotFoundError) and "/" not in program:
        return f"cannot run '{program}': it is not in PATH ({environment_of(order)['PATH']})"
    return f"cannot run '{program}': {error.strerror}"


def _unprepared(error: OSError) -> str:
    return f"cannot prepare the step's process: {error}"
