"""What happens in a build, for programs: one JSON object on a line, as it happens.

`qbuild schema --of events` prints the JSON Schema of a line. Imported only where it is asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from buildsys.engine.display import Unmoved

if TYPE_CHECKING:
    from buildsys.engine.display import Display
    from buildsys.engine.failure import Failure
    from buildsys.plan.graph import Json

VERSION = 1


class EventStream(Unmoved):
    """A display that writes events.

    Invariant: every `step_started` is followed by one of `step_ended`, `cached`; after
    `build_ended` comes nothing.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.time) -> None:
        self._stream = stream
        self._clock = clock
        self._began = clock()
        self._open: dict[str, float] = {}
        self._deaf = False

    def opened(self, recipe: str, name: str, folder: str, defines: Mapping[str, str]) -> None:
        """The build begins; what is stale is not known yet."""
        self._tell(
            "build_started",
            version=VERSION,
            recipe=recipe,
            name=name,
            folder=folder,
            defines=dict(defines),
        )

    def closed(self, status: str, exit_code: int, **figures: Json) -> None:
        """The build is over. status: done, failed, interrupted, error."""
        seconds = round(self._clock() - self._began, 3)
        self._tell("build_ended", status=status, exit_code=exit_code, seconds=seconds, **figures)

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        self._tell("steps", most=total, jobs=jobs)

    def started(self, name: str, why: str) -> None:
        self._open[name] = self._clock()
        self._tell("step_started", step=name, why=why)

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        self._tell("step_progress", step=name, done=done, total=total, unit=unit)

    def committed(self, name: str, record: Mapping[str, Json]) -> None:
        self._open.pop(name, None)
        made = {"step": name, "key": record["key"], "outputs": outputs_of(record)}
        if "restored" in record:
            self._tell("cached", **made, origin=record["restored"])
        else:
            self._ended("made", **made, **figures_of(record), warnings=list(record["warnings"]))

    def failed(self, failure: Failure) -> None:
        self._open.pop(failure.step, None)
        ended = failure.ended
        figures: dict[str, Json] = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_rss": 0}
        if ended is not None:
            figures = figures_of(
                {"wall": ended.wall, "cpu": ended.cpu, "memory": ended.peak_memory}
            )
            figures |= {"exit_code": ended.code, "signal": ended.signal}
        self._ended("failed", step=failure.step, **figures, error=failure.error, log=failure.log)

    def unneeded(self, name: str) -> None:
        self._tell("step_fresh", step=name)

    def say(self, text: str) -> None:
        level = "warning" if "warning:" in text else "error" if "error:" in text else "info"
        self._tell("message", level=level, text=text)

    def finished(self) -> None:
        """The engine stops: what still runs was interrupted."""
        for name, began in self._open.items():
            seconds = round(self._clock() - began, 4)
            self._ended("interrupted", step=name, seconds=seconds, cpu_seconds=0.0, peak_rss=0)
        self._open.clear()

    def _ended(self, status: str, **fields: Json) -> None:
        self._tell("step_ended", status=status, **fields)

    def _tell(self, event: str, **fields: Json) -> None:
        if self._deaf:
            return
        line = json.dumps({"event": event, "time": round(self._clock(), 3), **fields})
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._deaf = True  # who listened has gone; the build has not


class Tee(Unmoved):
    """Several displays as one: each is told of everything, in the order in which they stand."""

    def __init__(self, displays: Sequence[Display]) -> None:
        self._displays = displays

    def begin(self, total: int, estimates: Mapping[str, float], jobs: int) -> None:
        for each in self._displays:
            each.begin(total, estimates, jobs)

    def ready(self, name: str) -> None:
        for each in self._displays:
            each.ready(name)

    def waits(self, name: str, for_what: str) -> None:
        for each in self._displays:
            each.waits(name, for_what)

    def started(self, name: str, why: str) -> None:
        for each in self._displays:
            each.started(name, why)

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        for each in self._displays:
            each.progress(name, done, total, unit)

    def committed(self, name: str, record: Mapping[str, Json]) -> None:
        for each in self._displays:
            each.committed(name, record)

    def failed(self, failure: Failure) -> None:
        for each in self._displays:
            each.failed(failure)

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        for each in self._displays:
            each.ended(name, failed, wall, memory)

    def restored(self, name: str, origin: str) -> None:
        for each in self._displays:
            each.restored(name, origin)

    def unneeded(self, name: str) -> None:
        for each in self._displays:
            each.unneeded(name)

    def say(self, text: str) -> None:
        for each in self._displays:
            each.say(text)

    def finished(self) -> None:
        for each in self._displays:
            each.finished()


def outputs_of(record: Mapping[str, Json]) -> list[Json]:
    """What a journal line says of the outputs: path, digest, bytes."""
    sizes = record["sizes"]
    return [
        {"path": path, "digest": digest, "bytes": sizes[path]}
        for path, digest in record["outputs"].items()
    ]


def figures_of(record: Mapping[str, Json]) -> dict[str, Json]:
    return {
        "seconds": record["wall"],
        "cpu_seconds": record["cpu"],
        "peak_rss": record["memory"],
    }
