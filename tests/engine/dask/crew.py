"""A real scheduler and real workers, each a process, and builds that use them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

DEADLINE = 60.0
KEY = "ab" * 32


def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Wait for a condition; it fails the test where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"in {seconds} s there was no {what}"
        time.sleep(0.02)


class Running(NamedTuple):
    """A process of ours. said: the file that it prints to."""

    process: subprocess.Popen[bytes]
    said: Path

    @property
    def text(self) -> str:
        return self.said.read_text()

    def children(self) -> list[psutil.Process]:
        """Everything below it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def runs(self, word: str) -> list[psutil.Process]:
        """The processes below it with this word in their arguments."""
        found = []
        for each in self.children():
            with suppress(psutil.NoSuchProcess):
                if any(word in argument for argument in each.cmdline()[1:]):
                    found.append(each)
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """In order, if it goes."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.kill()


class Crew:
    """A scheduler, and workers that share a store."""

    def __init__(self, root: Path, allowed_failures: int = 3) -> None:
        self.root = root
        self.store = root / "store"
        self._count = 0
        self._all: list[Running] = []
        file = root / "scheduler.json"
        words = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
        words += ["--no-dashboard", "--scheduler-file", str(file)]
        name = "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"
        self.scheduler = self._start(words, {name: str(allowed_failures)})
        until(file.exists, "scheduler")
        import json

        self.url = json.loads(file.read_text())["address"].replace("tcp:", "dask:")

    def worker(self, *words: str, cpus: int = 1, wait: bool = True, **environment: str) -> Running:
        """Start `qbuild worker`; wait until it works."""
        arguments = ["-m", "buildsys", "worker", self.url, "--cpus", str(cpus), *words]
        worker = self._start(arguments, environment)
        if wait:
            until(lambda: "worker at" in worker.text or self._ended(worker), "worker")
        return worker

    def qbuild(self, folder: Path, *words: str, **environment: str) -> Running:
        """`qbuild all` in a process of its own, on this crew."""
        arguments = ["-m", "buildsys", "all", "--executor", self.url, *words]
        return self._start(arguments, environment, folder)

    def close(self) -> None:
        for each in reversed(self._all):
            each.end()

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "QBUILD_CACHE": str(self.store), "COLUMNS": "80", **more}

    def _ended(self, worker: Running) -> bool:
        assert worker.process.poll() is None, worker.text
        return False

    def _start(
        self, words: list[str], environment: Mapping[str, str], folder: Path | None = None
    ) -> Running:
        self._count += 1
        said = self.root / f"said-{self._count}"
        with said.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder or self.root,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        running = Running(process, said)
        self._all.append(running)
        return running


@contextmanager
def crew_in(root: Path, allowed_failures: int = 3) -> Iterator[Crew]:
    crew = Crew(root, allowed_failures)
    try:
        yield crew
    finally:
        crew.close()


def interrupt(running: Running) -> int:
    """Ctrl-C; the exit code."""
    running.process.send_signal(signal.SIGINT)
    return running.process.wait(DEADLINE)
