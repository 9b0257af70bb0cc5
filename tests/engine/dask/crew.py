"""A real scheduler and real workers, each a process, and builds that use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

    def __init__(self, root: Path, **environment: str) -> None:
        """environment: of all processes."""
        self.root = root
        self._environment = environment
        self.store = root / "store"
        self._count = 0
        self._all: list[Running] = []
        file = root / "scheduler.json"
        words = [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        words += ["--no-dashboard", "--scheduler-file", str(file)]
        self.scheduler = self.start(words, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1")
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"), "scheduler")
        self.url = json.loads(file.read_text())["address"].replace("tcp:", "dask:")

    def worker(self, *words: str, cpus: int = 1, wait: bool = True, **environment: str) -> Running:
        """Start `qbuild worker`; wait until it works."""
        command = [sys.executable, "-m", "buildsys", "worker", self.url, "--cpus", str(cpus)]
        worker = self.start([*command, *words], **environment)
        if wait:
            until(lambda: "worker at" in worker.text or self._ended(worker), "worker")
        return worker

    def qbuild(self, folder: Path, *words: str, **environment: str) -> Running:
        """`qbuild all` in a process of its own, on this crew."""
        command = [sys.executable, "-m", "buildsys", "all", "--executor", self.url]
        return self.start([*command, *words], folder, **environment)

    def close(self) -> None:
        for each in reversed(self._all):
            each.end()

    def _ended(self, worker: Running) -> bool:
        assert worker.process.poll() is None, worker.text
        return False

    def start(self, command: list[str], folder: Path | None = None, **environment: str) -> Running:
        """Any command, with the store of the crew."""
        self._count += 1
        said = self.root / f"said-{self._count}"
        own = {"QBUILD_CACHE": str(self.store), "COLUMNS": "80", **self._environment}
        with said.open("wb") as out:
            process = subprocess.Popen(
                command,
                cwd=folder or self.root,
                env={**os.environ, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        running = Running(process, said)
        self._all.append(running)
        return running


@contextmanager
def crew_in(root: Path, **environment: str) -> Iterator[Crew]:
    crew = Crew(root, **environment)
    try:
        yield crew
    finally:
        crew.close()


def interrupt(running: Running) -> int:
    """Ctrl-C; the exit code."""
    running.process.send_signal(signal.SIGINT)
    return running.process.wait(DEADLINE)
