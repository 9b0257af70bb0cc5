"""A rule's `make` in this very process, given the file of its order.

For a person in a step's place (`qbuild shell`), with a debugger if need be. What the rule
says, warns and notes is printed; nothing is committed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from buildsys.engine.local import interpreter
from buildsys.engine.local.step_main import Reporter, context, set_up_torch
from buildsys.engine.local.wire import order_from_json

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


PROGRESS_INTERVAL = 1.0  # seconds


class Printer(Reporter):
    """Prints what a step reports; progress once a second, and always the last of it."""

    def __init__(self) -> None:
        super().__init__(events=-1)  # there is nobody to send it to
        self._due = 0.0

    def progress(self, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if now >= self._due or done >= total:
            self._due = now + PROGRESS_INTERVAL
            print(f"{done:g}/{total:g} {unit}", file=sys.stderr)

    def note(self, key: str, value: Json) -> None:
        print(f"note: {key}: {json.dumps(value)}", file=sys.stderr)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def main(arguments: list[str]) -> None:
    """arguments: the order's file."""
    with open(arguments[0], "rb") as file:
        order = order_from_json(json.load(file))
    os.environ.update({**interpreter.OFFLINE, **os.environ})
    if order.worker == "python":
        set_up_torch(order.threads)
    importlib.import_module(order.module).make(context(order, Printer()))
    for name, path in order.context["outputs"].items():
        print(f"made {name}: {path}" if os.path.exists(path) else f"did not make {name}: {path}")
