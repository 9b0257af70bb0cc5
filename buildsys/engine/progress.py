"""How far a build is, in figures and in words; the displays show it and the engine tells it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from buildsys.engine.display import Display

MIB, GIB = 1 << 20, 1 << 30


class Running(NamedTuple):
    """A step that runs. began, since: seconds on the build's clock; at `since` it was at `base`
    of `total` units, now it is at `done`. estimate: seconds that its last run took."""

    began: float
    estimate: float | None
    since: float = 0.0
    base: float = 0.0
    done: float = 0.0
    total: float = 0.0
    unit: str = ""

    def moved(self, now: float, done: float, total: float, unit: str) -> Running:
        """The same step further on; a new phase (another unit or total) measures anew."""
        if (total, unit) != (self.total, self.unit) or done < self.done:
            return Running(self.began, self.estimate, now, done, done, total, unit)
        return self._replace(done=done)

    def rate(self, now: float) -> float | None:
        """Units per second in this phase; None before the first of them is done."""
        if now <= self.since or self.done <= self.base:
            return None
        return (self.done - self.base) / (now - self.since)

    def left(self, now: float) -> float | None:
        """Seconds left: by its own progress, else by its last run; None: nobody knows."""
        rate = self.rate(now)
        if rate is not None:
            return max(self.total - self.done, 0) / rate
        if self.estimate is not None:
            return max(self.estimate - (now - self.began), 0)
        return None


class Tally:
    """How far the build is. Invariant: every step is waiting, in `running`, or over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.total = 0
        self.over = 0
        self.running: dict[str, Running] = {}
        self._estimates: dict[str, float] = {}
        self._jobs = 1

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        """estimates: seconds that the last run of a step took, where there was one."""
        self.total = total
        self._estimates = dict(estimates)
        self._jobs = jobs

    def started(self, name: str) -> None:
        self.running[name] = Running(self.clock(), self._estimates.pop(name, None))

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        if name in self.running:
            self.running[name] = self.running[name].moved(self.clock(), done, total, unit)

    def ended(self, name: str) -> None:
        self.running.pop(name, None)
        self.over += 1

    def unneeded(self, name: str) -> None:
        """A step turned out to be fresh and will not run."""
        self._estimates.pop(name, None)
        self.total -= 1

    def left(self) -> float | None:
        """Seconds until all is made; None where a step has no record of how long it takes."""
        now = self.clock()
        running = [step.left(now) for step in self.running.values()]
        waiting = self.total - self.over - len(running)
        times = [time for time in (*running, *self._estimates.values()) if time is not None]
        if not times or len(times) < len(running) + waiting:
            return None
        # Work divided by hands, but never less than the longest single piece.
        return max(sum(times) / min(self._jobs, len(times)), *times)

    def status(self) -> str:
        """One line about the whole build."""
        parts = [f"{self.over} of {self.total} done", f"{len(self.running)} running"]
        left = self.left()
        if left:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time for people: 0.04 s, 3.1 s, 47 s, 1:12, 2:05:00."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory(size: int) -> str:
    """Bytes for people: 12 MiB, 1.4 GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{max(round(size / MIB), 1)} MiB"


def quantity(value: float) -> str:
    """Whole numbers as such; what lies between to two digits."""
    return f"{value:.0f}" if value == int(value) or value >= 10 else f"{value:.2g}"


def how_far(step: Running, now: float) -> str:
    """In the step's own unit, as in: 312/1000 questions, 24/s, 29 s left. Empty: nobody knows."""
    left = step.left(now)
    if not step.total:
        return f"about {duration(left)} left" if left else ""
    parts = [f"{quantity(step.done)}/{quantity(step.total)} {step.unit}".rstrip()]
    rate = step.rate(now)
    if rate is not None and left is not None:
        parts += [f"{quantity(rate)}/s", f"{duration(left)} left"]
    return ", ".join(parts)


def shortened(name: str, width: int) -> str:
    """A name that is too long loses its middle: both ends of a path tell more than that."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def choose_display(stream: TextIO, *, quiet: bool, reasons: bool = False) -> Display:
    """The display that fits: live on a terminal, a line per step in a file or a pipe."""
    from buildsys.engine import display

    if quiet:
        return display.QuietDisplay(stream)
    if not stream.isatty():
        return display.PlainDisplay(stream, reasons=reasons)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a sign that it cannot show must not end a build
    from buildsys.engine.terminal import LiveDisplay  # rich takes 40 ms

    return LiveDisplay(stream, reasons=reasons)
