"""The live display: what has ended scrolls by above, what runs stands below and is redrawn."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from buildsys.engine.progress import (
    Running,
    Tally,
    duration,
    how_far,
    indented,
    memory,
    shortened,
)

REDRAW = 0.1  # seconds; also how long lines of ended steps are gathered before they are printed
BAR = 10  # columns
WIDEST, SHORTEST_NAME = 100, 16  # columns
MOST_SHOWN = 12  # running steps


class LiveDisplay:
    """Invariant: nothing is drawn but in `tick`, `finished` and at the end."""

    def __init__(self, stream: TextIO, tally: Tally, console: Console | None = None) -> None:
        self._tally = tally
        self._console = console or Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, get_renderable=self._draw
        )
        self._lines: list[Text] = []
        self._next = 0.0
        plain = not self._console.encoding.lower().startswith("utf")
        self._signs = ("ok", "FAILED", "-", "!") if plain else ("✓", "✗", "–", "!")

    def started(self, name: str) -> None:
        self._tally.started(name)

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        self._tally.progress(name, done, total, unit)

    def ended(self, name: str, ok: bool, wall: float, peak: int, message: str = "") -> None:
        self._tally.ended(name)
        figures = f"{duration(wall):>8} {memory(peak):>9}"
        sign, style = (self._signs[0], "green") if ok else (self._signs[1], "bold red")
        self._add(sign, style, name, figures)
        if not ok and message:
            self._lines.append(Text(indented(message)[1:], style="red"))

    def skipped(self, name: str, reason: str) -> None:
        self._tally.ended(name)
        self._add(self._signs[2], "dim", f"{name} skipped: {reason}", "")

    def warning(self, name: str, text: str) -> None:
        self._add(self._signs[3], "yellow", f"{name}: {text}", "")

    def tick(self) -> None:
        """Draw anew, at most ten times a second."""
        now = self._tally.clock()
        if now >= self._next:
            self._next = now + REDRAW
            self._print_lines()
            self._live.refresh()

    def finished(self, summary: str) -> None:
        self._print_lines()
        self._live.stop()
        self._console.print(Text(summary))

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._print_lines()
        self._live.stop()

    def _add(self, sign: str, style: str, text: str, figures: str) -> None:
        """One line; figures stand at the right edge where the text leaves room for them."""
        line = Text.assemble((f"{sign} ", style), text)
        room = min(self._console.width, WIDEST) - len(figures)
        if figures:
            line.pad_right(max(room - line.cell_len, 1))
            line.append(figures, "dim")
        self._lines.append(line)

    def _print_lines(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            self._console.print(Text("\n").join(lines), soft_wrap=True)

    def _draw(self) -> RenderableType:
        now = self._tally.clock()
        steps = list(self._tally.running.items())
        shown = steps[:MOST_SHOWN]
        texts = [(how_far(step, now), duration(round(now - step.began))) for _, step in shown]
        far, elapsed = (max((len(text[at]) for text in texts), default=0) for at in (0, 1))
        width = min(self._console.width, WIDEST) - 1  # the last column may wrap some terminals
        far = min(far, width - BAR - elapsed - SHORTEST_NAME - 5)
        room = width - BAR - far - elapsed - 5  # two columns of margin, three between
        table = Table.grid(padding=(0, 1, 0, 0))
        for size in (room + 2, BAR, far, elapsed):
            table.add_column(width=size, no_wrap=True)
        for (name, step), (text, time) in zip(shown, texts, strict=True):
            named = f"  {shortened(name, room)}"
            table.add_row(named, _bar(step, now), text, Text(time, justify="right"))
        more = len(steps) - MOST_SHOWN
        rest = [Text(f"  and {more} more", style="dim")] if more > 0 else []
        return Group(table, *rest, Text(self._tally.status(), style="bold"))


def _bar(step: Running, now: float) -> RenderableType:
    """How far by its own word, else by how long it took last time; empty where nobody knows."""
    if step.total:
        return ProgressBar(total=step.total, completed=step.done, width=BAR)
    if step.estimate:
        return ProgressBar(
            total=step.estimate,
            completed=min(now - step.began, step.estimate),
            width=BAR,
            style="dim",
            complete_style="dim cyan",
        )
    return Text()
