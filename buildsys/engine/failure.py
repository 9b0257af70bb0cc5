"""What a person is told of a step that failed: why, with which signal, how much memory it
held, and the end of what it said."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.folder import shown

if TYPE_CHECKING:
    from buildsys.engine.executor import Ended

LINES = 20
TAIL = 16 << 10
MIB = 1 << 20


class Failure(NamedTuple):
    """A step that was not made. ended: what the executor says; None where it was not its fault.
    log: path of the step's output."""

    step: str
    error: str
    ended: Ended | None
    log: str

    def __str__(self) -> str:
        lines = [f"error: {self.step}: {without_the_word(self.error)}"]
        if self.ended is not None:
            lines.append(f"  {figures(self.ended)}")
            # A mistake of the user's has no traceback; a bug of a rule shows it.
            lines += [f"  {line}" for line in self.ended.traceback.rstrip().splitlines()]
        tail = tail_of(self.log)
        if tail:
            lines += [f"  the end of its output ({shown(self.log)}):"]
            lines += [f"  | {line}" for line in tail]
        return "\n".join(lines)


def without_the_word(error: str) -> str:
    """The text of an error without the word "error", at its beginning or after its place.

    >>> without_the_word("w.pth: error: it is cut short")
    'w.pth: it is cut short'
    """
    first, newline, rest = error.removeprefix("error: ").partition("\n")
    return first.replace(": error: ", ": ", 1) + newline + rest


def figures(ended: Ended) -> str:
    """Signal, time and memory on one line."""
    parts = []
    if ended.signal:
        known = {each.value: each.name for each in signal.Signals}
        parts.append(f"signal {known.get(ended.signal, ended.signal)}")
    elif ended.code:
        parts.append(f"exit status {ended.code}")
    parts += [f"after {ended.wall:.1f} s", f"peak memory {ended.peak_memory / MIB:.0f} MiB"]
    if ended.strays:
        parts.append(f"{ended.strays} processes that it left were ended")
    return ", ".join(parts)


def tail_of(log: str) -> list[str]:
    """The last lines of a log; none where there is no log or it is empty."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL, 0))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip("\r") for line in text.rstrip("\n").split("\n")[-LINES:] if text.strip()]
