"""The live display: what has ended scrolls by above, what runs stands below and is redrawn.

A thread draws, ten times a second and all that has gathered at once: drawing for every event
would take longer than a short step does, and a long step gives no event at all.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from buildsys.engine.display import Unmoved
from buildsys.engine.progress import Running, Tally, duration, how_far, memory, shortened

REDRAW = 0.1  # seconds
BAR = 10  # columns
WIDEST, SHORTEST_NAME = 100, 16  # columns
MOST_SHOWN = 12  # running steps
NO_ESTIMATES: Mapping[str, float] = MappingProxyType({})


class LiveDisplay(Unmoved):
    """The engine's thread tells and never draws; the drawing thread draws and never tells.

    Invariant: `_tally` and `_lines` are touched under `_lock` only.
    """

    def __init__(
        self, stream: TextIO, *, reasons: bool = False, console: Console | None = None
    ) -> None:
        self._console = console or Console(file=stream, highlight=False)
        self._reasons = reasons
        self._tally = Tally()
        self._lines: list[Text] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, get_renderable=self._picture
        )

    def begin(
        self, total: int, estimates: Mapping[str, float] = NO_ESTIMATES, jobs: int = 1
    ) -> None:
        """A build of so many steps begins; estimates: seconds of their last runs."""
        self._tally.begin(total, estimates, jobs)
        self._live.start()
        self._thread = threading.Thread(target=self._draw_on, daemon=True)
        self._thread.start()

    def started(self, name: str, why: str) -> None:
        with self._lock:
            self._tally.started(name)
        if self._reasons:
            self.say(f"{name}: {why}")

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        with self._lock:
            self._tally.progress(name, done, total, unit)

    def ended(self, name: str, failed: bool, wall: float, memory: int) -> None:
        line = self._ended_line(name, failed, wall, memory)
        with self._lock:
            self._tally.ended(name)
            self._lines.append(line)

    def restored(self, name: str, origin: str) -> None:
        line = Text.assemble(("↓ ", "cyan"), name, (f"  from {origin}", "dim"))
        with self._lock:
            self._tally.ended(name)
            self._lines.append(line)

    def unneeded(self, name: str) -> None:
        with self._lock:
            self._tally.unneeded(name)

    def say(self, text: str) -> None:
        """Lines above what moves; also before `begin` and after `finished`."""
        with self._lock:
            self._lines.append(Text(text))
        if self._thread is None:
            self._print_lines()

    def finished(self) -> None:
        """Take down what moves and leave the rest. May be called twice."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            self._live.stop()
        self._print_lines()

    def _draw_on(self) -> None:
        while not self._over.wait(REDRAW):
            self._print_lines()
            self._live.refresh()

    def _print_lines(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        if lines:
            self._console.print(Text("\n").join(lines), soft_wrap=True)

    def _ended_line(self, name: str, failed: bool, wall: float, peak: int) -> Text:
        """One line; the figures stand at the right edge where the name leaves room for them."""
        sign, style = ("✗", "bold red") if failed else ("✓", "green")
        line = Text.assemble((f"{sign} ", style), name)
        figures = f"{duration(wall):>8} {memory(peak):>9}"
        room = min(self._console.width, WIDEST) - len(figures)
        line.pad_right(max(room - line.cell_len, 1))
        return line.append(figures, "dim")

    def _picture(self) -> RenderableType:
        with self._lock:
            return picture(self._tally, self._console.width)


def picture(tally: Tally, width: int) -> RenderableType:
    """What runs, one row each, and a line about the whole, on `width` columns."""
    now = tally.clock()
    steps = list(tally.running.items())
    shown = [
        (name, step, how_far(step, now), duration(round(now - step.began)))
        for name, step in steps[:MOST_SHOWN]
    ]
    far, elapsed = (max((len(row[at]) for row in shown), default=0) for at in (2, 3))
    width = min(width, WIDEST) - 1  # the last column makes some terminals wrap
    far = min(far, width - BAR - elapsed - SHORTEST_NAME - 5)
    room = width - BAR - far - elapsed - 5  # two columns of margin, three between
    table = Table.grid(padding=(0, 1, 0, 0))
    for size in (room + 2, BAR, far, elapsed):
        table.add_column(width=size, no_wrap=True)
    for name, step, text, time in shown:
        named = Text(f"  {shortened(name, room)}")
        table.add_row(named, _bar(step, now), Text(text), Text(time, justify="right"))
    more = len(steps) - len(shown)
    rest = [Text(f"  and {more} more", style="dim")] if more else []
    return Group(table, *rest, Text(tally.status(), style="bold"))


def _bar(step: Running, now: float) -> RenderableType:
    """How far by its own word, else by how long it took last time; empty where nobody knows."""
    if step.total:
        return ProgressBar(total=step.total, completed=min(step.done, step.total), width=BAR)
    if step.estimate:
        passed = min(now - step.began, step.estimate)
        return ProgressBar(total=step.estimate, completed=passed, width=BAR, complete_style="cyan")
    return Text()
