"""What a build tells while it runs: the interface, and the plain form with a line per step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from buildsys.engine.failure import Failure
    from buildsys.plan.graph import Json

MIB = 1 << 20


class Display(Protocol):
    """Told of everything that happens to steps; called by one thread."""

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        """A build of so many steps at most begins (fewer if some turn out to be fresh), so many
        at a time. estimates: seconds that the last run of a step took, where there was one."""

    def ready(self, name: str) -> None:
        """Everything that a step reads is in place; it waits for its turn."""

    def waits(self, name: str, for_what: str) -> None:
        """A step that is ready cannot start yet: what there is too little of ("memory", "cpu",
        "gpu", "licence NAME"). Told again whenever the engine has looked again."""

    def started(self, name: str, why: str) -> None:
        """A step has started."""

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """How far a running step is."""

    def committed(self, name: str, record: Mapping[str, Json]) -> None:
        """A step is made; its journal line. `ended` or `restored` follows."""

    def failed(self, failure: Failure) -> None:
        """A step is not made. `ended` follows, and what there is to read, by `say`."""

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


class Unmoved:
    """Tells nobody of anything: what a display does not show."""

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        """Nothing; so it is with all of these."""

    def ready(self, name: str) -> None:
        """Nothing."""

    def waits(self, name: str, for_what: str) -> None:
        """Nothing."""

    def started(self, name: str, why: str) -> None:
        """Nothing."""

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """Nothing."""

    def committed(self, name: str, record: Mapping[str, Json]) -> None:
        """Nothing."""

    def failed(self, failure: Failure) -> None:
        """Nothing."""

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        """Nothing."""

    def restored(self, name: str, origin: str) -> None:
        """Nothing."""

    def unneeded(self, name: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def finished(self) -> None:
        """Nothing."""


class PlainDisplay(Unmoved):
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


class QuietDisplay(PlainDisplay):
    """Only what `say` is given (failures, warnings)."""

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        """Nothing: who asked for quiet learns of failures by `say`."""

    def restored(self, name: str, origin: str) -> None:
        """Nothing."""
