"""What a build tells while it runs: the interface, and the plain form with a line per step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol, TextIO

MIB = 1 << 20


class Display(Protocol):
    """Told of everything that happens to steps; called by one thread."""

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        """A build of so many steps at most begins (fewer if some turn out to be fresh), so many
        at a time. estimates: seconds that the last run of a step took, where there was one."""

    def started(self, name: str, why: str) -> None:
        """A step has started."""

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """How far a running step is."""

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        """A step has failed or is committed. wall in seconds, memory (its peak) in bytes."""

    def restored(self, name: str, origin: str) -> None:
        """A step did not run: its outputs were in `origin`, and are committed."""

    def unneeded(self, name: str) -> None:
        """A step turned out to be fresh: what it reads came out the same."""

    def say(self, text: str) -> None:
        """Lines for the person, above whatever moves."""

    def finished(self) -> None:
        """The build is over; the terminal is the caller's again."""


class PlainDisplay:
    """One line per finished step: for files, pipes and terminals that cannot move the cursor."""

    def __init__(self, stream: TextIO = sys.stderr, *, reasons: bool = False) -> None:
        self._stream = stream
        self._reasons = reasons
        self._total = 0
        self._count = 0

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        self._total = total

    def started(self, name: str, why: str) -> None:
        if self._reasons:
            self.say(f"{name}: {why}")

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """Nothing: a line per tensor would be too many."""

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        self._count += 1
        what = "FAILED " if failed else ""
        figures = f"{wall:.1f} s, {memory / MIB:.0f} MiB"
        self.say(f"[{self._count}/{self._total}] {what}{name} ({figures})")

    def restored(self, name: str, origin: str) -> None:
        self._count += 1
        self.say(f"[{self._count}/{self._total}] {name} (from {origin})")

    def unneeded(self, name: str) -> None:
        self._total -= 1

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def finished(self) -> None:
        """Nothing to tidy."""


class QuietDisplay(PlainDisplay):
    """Only what `say` is given (failures, warnings)."""

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        """Nothing: who asked for quiet learns of failures by `say`."""

    def restored(self, name: str, origin: str) -> None:
        """Nothing."""
