"""Lines that fit the terminal. A pipe gets them whole: programs read those, and `grep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

NARROWEST = 20  # columns; below, lines are broken as the terminal likes


def width_of(stream: TextIO = sys.stdout) -> int | None:
    """Columns of the terminal that a stream goes to; None where it goes elsewhere."""
    if not stream.isatty():
        return None
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        return None
    return columns if columns >= NARROWEST else None


def folded(line: str, width: int | None, indent: int = 2) -> str:
    """The line, folded at spaces to `width` columns; what goes on is indented, as far as its
    longest word leaves room. A word that is longer than all that stays whole, to be copied."""
    if width is None or len(line) <= width:
        return line
    import textwrap  # not on the way of a build with nothing to do

    lead = len(line) - len(line.lstrip())
    longest = max(map(len, line[lead + indent :].split()), default=0)
    further = " " * max(min(lead + indent, width - longest), min(lead + 2, indent))
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            subsequent_indent=further,
            break_on_hyphens=False,
            break_long_words=False,
            replace_whitespace=False,
        )
    )


def show(lines: Iterable[str], stream: TextIO | None = None, indent: int = 2) -> None:
    """Print lines, folded to the terminal if there is one."""
    stream = sys.stdout if stream is None else stream
    width = width_of(stream)
    for line in lines:
        print(folded(line, width, indent), file=stream)


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names with commas; of very many, the first and how many more.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
