"""Threads that a process need not wait for: what they do may be cut off at any moment."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Runs work in order of its coming, on up to so many daemon threads.

    `concurrent.futures` has such a pool, but waits for its threads at exit: a server that does
    not answer would hold up an interrupted build.
    """

    def __init__(self, threads: int) -> None:
        self._free = threads
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._queue.put((future, work))
        if self._free:
            self._free -= 1
            threading.Thread(target=self._run, daemon=True).start()
        return future

    def drop(self) -> None:
        """Forget what has not begun."""
        try:
            while True:
                self._queue.get_nowait()[0].cancel()
        except queue.Empty:
            return

    def _run(self) -> None:
        while True:
            future, work = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # it is the waiter's: `result()` raises it there
                future.set_exception(error)
