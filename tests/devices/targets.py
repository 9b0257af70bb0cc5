"""Devices of each kind as tests see them: what is described, and the folder as it really is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from buildsys.devices.definitions import Device, Run
from buildsys.devices.deploying import Task, deploy
from buildsys.devices.host_files import HostFiles
from buildsys.devices.payload import PushFile
from buildsys.devices.progress import Report
from buildsys.devices.protocol import Options


class Notes(Report):
    """Keeps what is told; `on` is called with each event."""

    def __init__(self, on: Callable[[str], None] | None = None) -> None:
        super().__init__("device")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.printed = {"stdout": b"", "stderr": b""}
        self._on = on

    def event(self, kind: str, text: str = "", **facts: Any) -> None:
        self.events.append((kind, facts))
        self.texts.append(text)
        if self._on is not None:
            self._on(kind)

    def progress(self, file: str, done: int, total: int, rate: float) -> None:
        if self._on is not None:
            self._on("progress")

    def output(self, stream: str, data: bytes) -> None:
        self.printed[stream] += data
        if self._on is not None:
            self._on("output")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [facts for each, facts in self.events if each == kind]

    @property
    def sent(self) -> int:
        """Bytes that left for the device."""
        return sum(facts["sent"] for facts in self.of("sent"))


class Target:
    """A device to deploy to. kind: "local", "adb" or "ssh". here: its root as this machine sees
    it. machine: phone, board or None, for faults."""

    def __init__(
        self, kind: str, root: str, here: Path, at: Mapping[str, Any], machine: Any, store: Path
    ) -> None:
        self.kind, self.here, self.machine = kind, here, machine
        self.device = Device("it", kind, root, (), {}, None, {}, {}, at)
        self.store = store
        self.memory = HostFiles(str(store / "memory"))
        self.notes = Notes()

    def file(self, target: str, content: bytes, mode: int = 0o644, artifact: str = "") -> PushFile:
        """A file to push."""
        path = self.store / "files" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return PushFile(target, str(path), mode, artifact or target, self.memory.of(str(path)))

    def program(self, script: str, **run: Any) -> PushFile:
        """A program to run; `run` as in a recipe."""
        run = {"timeout": 30.0, "environment": {}, "exit": 0, "output": None, **run}
        argv = run.pop("argv", ("./program",))
        self.device = replace(self.device, run=Run(argv, **run))
        return self.file("program", b"#!/bin/sh\n" + script.encode(), 0o755)

    def deploy(
        self,
        *files: PushFile,
        stop: threading.Event | None = None,
        on: Callable[[str], None] | None = None,
        arguments: tuple[str, ...] = (),
        run: bool = False,
        dry_run: bool = False,
        **options: bool,
    ) -> int:
        """Deploy; what was told is in `notes`."""
        self.notes = Notes(on)
        results = str(self.store / "results")
        task = Task(Options(**options), dry_run, run, arguments, None, results)
        return deploy(self.device, files, task, self.notes, stop or threading.Event())

    def content(self) -> dict[str, bytes]:
        """What is there, but for qbuild's own folder."""
        return {
            str(path.relative_to(self.here)): path.read_bytes()
            for path in sorted(self.here.rglob("*"))
            if path.is_file() and ".qb" not in path.parts
        }

    def parts(self) -> list[Path]:
        return sorted((self.here / ".qb").glob("*.part"))


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that no compression makes smaller and that differ for every seed."""
    import random

    return random.Random(seed).randbytes(size)


def forge_times(path: Path, before: os.stat_result) -> None:
    """Make a file look as old as it was, as far as programs can."""
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
