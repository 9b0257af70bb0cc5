"""Orders for the local executor, and waiting for what comes of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buildsys.engine.executor import Ended, Event, Order, Started
from buildsys.engine.local import process_tree
from buildsys.engine.local.executor import LocalExecutor

DEADLINE = 60.0


class Workshop:
    """One executor, and orders for it in folders below a temporary one."""

    def __init__(self, root: Path, lock_fd: int | None = None) -> None:
        self.root = root
        self.executor = LocalExecutor(lock_fd)
        self.events: list[Event] = []

    def order(self, name: str, argv: tuple[str, ...] = (), **fields: Any) -> Order:
        staging = self.root / f"staging-{name}"
        staging.mkdir()
        context = {
            "name": name,
            "inputs": fields.pop("inputs", {}),
            "options": fields.pop("options", {}),
            "outputs": {"out": str(staging / "out")},
            "device": "cpu",
            "environment": {},
            "toolchain": {},
        }
        defaults: dict[str, Any] = {
            "module": "",
            "environment": {},
            "worker": "light",
            "threads": 1,
            "timeout": None,
            "memory_limit": None,
        }
        rest = {**defaults, **fields}
        log = str(self.log(name))
        return Order(id=name, argv=argv, context=context, staging=str(staging), log=log, **rest)

    def script(self, name: str, code: str, *arguments: str, **fields: Any) -> Order:
        """An order that runs a Python script as a program."""
        return self.order(name, (sys.executable, "-I", "-S", "-c", code, *arguments), **fields)

    def rule(self, name: str, do: str, **fields: Any) -> Order:
        """An order that runs `a_rule`."""
        module = "tests.engine.local.a_rule"
        return self.order(name, module=module, options={"do": do}, **fields)

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def staging(self, name: str) -> Path:
        return self.root / f"staging-{name}"

    def until(self, done: Callable[[], bool]) -> None:
        """Take events until `done`; fails rather than waits for ever."""
        deadline = time.monotonic() + DEADLINE
        while not done():
            assert time.monotonic() < deadline, f"still waiting after {self.events}"
            self.events += self.executor.poll(0.05)

    def ended(self, name: str) -> Ended | None:
        found = [event for event in self.events if event.id == name and isinstance(event, Ended)]
        return found[0] if found else None

    def pid(self, name: str) -> int:
        """The process of a step, once qbuild knows that it runs."""
        found: list[int] = []

        def known() -> bool:
            events = (event for event in self.events if event.id == name)
            found[:] = [event.pid for event in events if isinstance(event, Started)]
            return bool(found)

        self.until(known)
        return found[0]

    def run(self, *orders: Order) -> list[Ended]:
        """Submit them all and wait for their ends, in the order of submission."""
        for order in orders:
            self.executor.submit(order)
        self.until(lambda: all(self.ended(order.id) for order in orders))
        return [end for order in orders if (end := self.ended(order.id))]

    def wait_for_text(self, name: str, text: str) -> str:
        """The step's log, once it contains `text`: how a step tells that it is ready."""
        log = self.log(name)
        self.until(lambda: log.exists() and text in log.read_text())
        return log.read_text()


def is_alive(pid: int) -> bool:
    state = process_tree.state(pid)
    return state is not None and state[0] != "Z"
