"""What a person sees of a build: what has ended, what runs and how far it is, what is left.

`open_display` gives a display that fits where it writes: a live one on a terminal, plain lines
in a file or a pipe, only what went wrong for `-q`. The engine tells it what happens and calls
`tick` from its loop; nothing here has a thread or a clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple, Protocol, TextIO

MIB, GIB = 1 << 20, 1 << 30
STILL_RUNNING = 60.0  # seconds between lines about a long step where there is no terminal


class Display(Protocol):
    """The engine's view of it. `message` and `text` may have several lines."""

    def started(self, name: str) -> None: ...
    def progress(self, name: str, done: float, total: float, unit: str) -> None: ...
    def ended(self, name: str, ok: bool, wall: float, peak: int, message: str = "") -> None: ...
    def skipped(self, name: str, reason: str) -> None: ...
    def warning(self, name: str, text: str) -> None: ...
    def tick(self) -> None: ...
    def finished(self, summary: str) -> None: ...
    def __enter__(self) -> Display: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Running(NamedTuple):
    """A step that runs. began, since: seconds on the build's clock; at `since` it was at `base`
    of `total` units, now it is at `done`."""

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
        """Units per second in this phase."""
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
    """How far the build is. Invariant: a step is waiting, running or counted as over."""

    def __init__(
        self,
        steps: Mapping[str, float | None],
        jobs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.total = len(steps)
        self.over = 0
        self.running: dict[str, Running] = {}
        self._waiting = dict(steps)
        self._jobs = jobs

    def started(self, name: str) -> None:
        self.running[name] = Running(self.clock(), self._waiting.pop(name, None))

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        if name in self.running:
            self.running[name] = self.running[name].moved(self.clock(), done, total, unit)

    def ended(self, name: str) -> None:
        self.running.pop(name, None)
        self._waiting.pop(name, None)
        self.over += 1

    def left(self) -> float | None:
        """Seconds until all is made; None while a step has no record of how long it takes."""
        now = self.clock()
        running = [step.left(now) for step in self.running.values()]
        times = [time for time in (*running, *self._waiting.values()) if time is not None]
        if not times or len(times) < len(running) + len(self._waiting):
            return None
        # Work divided by hands, but never less than the longest single piece.
        return max(sum(times) / min(self._jobs, len(times)), *times)

    def status(self) -> str:
        """One line about the whole build."""
        parts = [f"{self.over} of {self.total} done", f"{len(self.running)} running"]
        left = self.left()
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time for people: 0.04 s, 3.1 s, 47 s, 1:12, 2:05:00."""
    if seconds < 10:
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
    """Whole numbers as such; what lies between to three digits."""
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def how_far(step: Running, now: float) -> str:
    """ "312/1000 questions, 24/s, 29 s left"; empty where the step says nothing."""
    if not step.total:
        return ""
    parts = [f"{quantity(step.done)}/{quantity(step.total)} {step.unit}".rstrip()]
    rate, left = step.rate(now), step.left(now)
    if rate is not None and left is not None:
        parts += [f"{quantity(float(f'{rate:.2g}'))}/s", f"{duration(left)} left"]
    return ", ".join(parts)


def shortened(name: str, width: int) -> str:
    """A name that is too long loses its middle: both ends of a path tell more than that."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def indented(text: str) -> str:
    return "".join(f"\n    {line}" for line in text.splitlines())


class PlainDisplay:
    """One line per event, for files and pipes; `quiet`: only what went wrong."""

    def __init__(self, stream: TextIO, tally: Tally, quiet: bool = False) -> None:
        self._stream = stream
        self._tally = tally
        self._quiet = quiet
        self._spoken: dict[str, float] = {}

    def started(self, name: str) -> None:
        self._tally.started(name)
        self._spoken[name] = self._tally.clock()

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        self._tally.progress(name, done, total, unit)

    def ended(self, name: str, ok: bool, wall: float, peak: int, message: str = "") -> None:
        self._tally.ended(name)
        if ok:
            self._say(f"{self._count()} {name}  {duration(wall)}, {memory(peak)}")
        else:
            figures = f"after {duration(wall)}, {memory(peak)}"
            self._say(f"{self._count()} {name} FAILED {figures}{indented(message)}", urgent=True)

    def skipped(self, name: str, reason: str) -> None:
        self._tally.ended(name)
        self._say(f"{self._count()} {name} skipped: {reason}")

    def warning(self, name: str, text: str) -> None:
        self._say(f"warning: {name}: {text}", urgent=True)

    def tick(self) -> None:
        """Say now and then that a long step is alive: a log without a word looks like a hang."""
        now = self._tally.clock()
        for name, step in self._tally.running.items():
            if now >= self._spoken[name] + STILL_RUNNING:
                self._spoken[name] = now
                far = how_far(step, now)
                self._say(f"  {name} runs for {duration(now - step.began)}{far and ': ' + far}")

    def finished(self, summary: str) -> None:
        self._say(summary)

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def _count(self) -> str:
        total = self._tally.total
        return f"[{self._tally.over:{len(str(total))}}/{total}]"

    def _say(self, line: str, *, urgent: bool = False) -> None:
        if urgent or not self._quiet:
            self._stream.write(f"{line}\n")
            self._stream.flush()


def open_display(
    stream: TextIO, steps: Mapping[str, float | None], jobs: int, *, quiet: bool = False
) -> Display:
    """A display for a build of `steps` (name -> seconds that its last run took, if known) of
    which `jobs` run at a time; used with `with`."""
    tally = Tally(steps, jobs)
    if quiet or not stream.isatty():
        return PlainDisplay(stream, tally, quiet)
    from buildsys.engine.terminal import LiveDisplay  # rich takes 40 ms

    return LiveDisplay(stream, tally)
