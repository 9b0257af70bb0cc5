"""From an order to a running process: in a session of its own, confined, with a clean slate.

All that can be done beforehand is done before the fork: every page that the child writes, if
only to count a reference, is first copied, and that would be most of what a short step costs.
"""

from __future__ import annotations

import os
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
    """Start the order's program directly; its pid. `events` takes word of a failed start.

    OSError where the program is not in PATH or the step's folder cannot be prepared.
    """
    environment = environment_of(order)
    program = find_program(order.argv[0], environment["PATH"])
    ruleset = landlock.ruleset((order.staging, *order.writable)) if landlock.abi() else None
    log = open_log(order)

    def execute() -> None:
        enter_step(order.staging, log)
        if ruleset is not None:
            landlock.restrict(ruleset)
        os.execve(program, order.argv, environment)

    try:
        return _fork(execute, events, order.argv[0])
    finally:
        os.close(log)
        if ruleset is not None:
            os.close(ruleset)


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


def die_with_parent() -> None:
    """Be killed when the parent dies. Sound only because the supervisor has one thread: the
    signal comes when the thread that forked ends, not the process."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment_of(order: Order) -> dict[str, str]:
    """The whole environment of the order's process."""
    return interpreter.step_environment(dict(order.environment), order.staging, order.threads)
