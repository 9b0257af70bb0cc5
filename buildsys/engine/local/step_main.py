"""Inside a step's own process: the rule's `make`, with all that it may know in its context."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from buildsys.engine.local import interpreter, process_tree
from buildsys.engine.local.spawn import enter_step, environment_of, open_log
from buildsys.engine.local.wire import encode, read_order
from buildsys.errors import QbuildError, disk_error, explain, is_for_people
from buildsys.rules.spec import Input, StepContext

if TYPE_CHECKING:
    from buildsys.engine.executor import Order
    from buildsys.plan.graph import Json

PROGRESS_INTERVAL = 0.1  # seconds; a person sees no more, and a pipe holds only so much


def main(arguments: list[str]) -> None:
    """A fresh interpreter. arguments: the descriptors of the order and of its events."""
    order, events = map(int, arguments)
    for fd in (order, events):
        os.set_inheritable(fd, False)
    run(order, events)


def run(order_fd: int, events: int) -> NoReturn:
    """Run the order and end the process: 0 made, 1 not."""
    code = 1
    # Nothing may return into the code that forked this process.
    try:
        code = _run(read_order(order_fd), Reporter(events))
    except BaseException as error:
        _send(events, ["failed", f"{type(error).__name__}: {error}", traceback.format_exc()])
    finally:
        os._exit(code)


def _run(order: Order, report: Reporter) -> int:
    log = open_log(order)
    enter_step(order.staging, log)
    os.close(log)
    os.environ.clear()
    os.environ.update({**interpreter.OFFLINE, **environment_of(order)})
    if order.context.get("device", "cpu") != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS sums as it likes
    gc.enable()
    try:
        if order.worker == "python":
            set_up_torch(order.threads)
        module = importlib.import_module(order.module)
        module.make(context(order, report))
    except BaseException as error:
        report.failed(*describe(error))
        return 1
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    report.made(_own_memory())
    return 0


def set_up_torch(threads: int) -> None:
    import torch

    # OMP_NUM_THREADS was read when torch was imported, in the worker: only this counts now.
    torch.set_num_threads(threads)
    # use_deterministic_algorithms(True) does the same, and imports all of torch._inductor: 0.8 s.
    torch.set_deterministic_debug_mode("error")


def context(order: Order, report: Reporter) -> StepContext:
    """The rule's view of the order: paths are Paths, and what it says goes to `report`."""
    given = order.context
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    return StepContext(
        name=given["name"],
        inputs={name: tuple(map(_input, values)) for name, values in given["inputs"].items()},
        options=given["options"],
        outputs={name: Path(path) for name, path in given["outputs"].items()},
        threads=order.threads,
        device=given.get("device", "cpu"),
        environment=given.get("environment", {}),
        toolchain=given.get("toolchain", {}),
        progress=report.progress,
        note=report.note,
        warn=report.warn,
        log=logging.getLogger("qbuild.step"),
        kept=Path(given["kept"]) if "kept" in given else None,
        memory=given.get("memory"),
    )


def _input(value: Json) -> Input:
    paths = {name: Path(path) for name, path in value["paths"].items()}
    return Input(value["name"], value["kind"], paths, value["digest"], value.get("options", {}))


class Reporter:
    """Sends what the step says; progress at most ten times a second, and always the last of it."""

    def __init__(self, events: int) -> None:
        self._events = events
        self._next = 0.0

    def progress(self, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if now >= self._next or done >= total:
            self._next = now + PROGRESS_INTERVAL
            _send(self._events, ["progress", float(done), float(total), unit])

    def note(self, key: str, value: Json) -> None:
        _send(self._events, ["note", key, value])

    def warn(self, text: str) -> None:
        _send(self._events, ["warning", text])

    def made(self, memory: int) -> None:
        _send(self._events, ["made", memory])

    def failed(self, error: str, trace: str) -> None:
        _send(self._events, ["failed", error, trace])


def _send(events: int, message: Json) -> None:
    data = memoryview(encode(message))
    while data:
        data = data[os.write(events, data) :]


def describe(error: BaseException) -> tuple[str, str]:
    """What to show of an exception: the message, and the traceback unless the mistake is the
    user's or the machine is simply too small."""
    if isinstance(error, QbuildError):
        if error.location:
            return explain(error), ""
        return "\n".join(filter(None, (error.message, error.remedy))), ""
    told = disk_error(error) or error
    if is_for_people(told):
        return str(told).removeprefix("error: "), ""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, trace))
    if _is_out_of_memory(error):
        return f"out of memory: {error or 'an allocation failed'}", text
    if isinstance(error, SystemExit):
        return f"the rule ended its process with sys.exit({error.code!r})", text
    return f"{type(error).__name__}: {error}", text


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError; on a GPU the class is its own.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _own_memory() -> int:
    """What this process holds at the end, in bytes: the only look at a step that is too short
    for the supervisor's."""
    return process_tree.memory([os.getpid()], floor=0).proportional
