"""Mistakes that a person can mend: what happened, where, and what to do.

Every error of this family is printed without a traceback and ends qbuild with its
`exit_code`. Anything else that escapes is a bug of ours and shows its traceback.
Rooms that import nothing of qbuild (`formats`, `quant`) and `models` have a base class of
their own; `is_for_people` tells them all.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

# What a disk says that is full, read-only or broken.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


class Location(NamedTuple):
    """A place in a recipe: 1-based line and column, and the text of that line."""

    file: str
    line: int
    column: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class QbuildError(Exception):
    """A mistake of the user's, or a failure of the world that a person can mend."""

    exit_code = 1

    def __init__(
        self, message: str, *, remedy: str | None = None, location: Location | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.location = location

    def __str__(self) -> str:
        return explain(self)


class RecipeError(QbuildError):
    """The recipe says something that cannot be; nothing was built and nothing changed."""

    exit_code = 2


class UsageError(QbuildError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class ToolchainMissing(QbuildError):
    """A toolchain or a device that is needed is not there."""

    exit_code = 3


class StepError(QbuildError):
    """A rule refuses its inputs or options: the artifact is not made."""


class BuildFailed(QbuildError):
    """At least one step or gate failed; what could be built was."""


def explain(error: QbuildError) -> str:
    """The message with its place, the source line, a caret and the remedy.

    >>> print(RecipeError("unknown rule 'rotaton'", remedy="did you mean 'rotation'?",
    ...     location=Location("r.yaml", 3, 9, "  rule: rotaton")))
    r.yaml:3:9: error: unknown rule 'rotaton'
      rule: rotaton
            ^
    did you mean 'rotation'?
    """
    lines = []
    if error.location is None:
        lines.append(f"error: {error.message}")
    else:
        lines.append(f"{error.location}: error: {error.message}")
        if error.location.text:
            # Tabs are kept in the margin so that the caret stands where an editor shows it.
            margin = "".join(
                "\t" if c == "\t" else " " for c in error.location.text[: error.location.column - 1]
            )
            lines += [error.location.text, f"{margin}^"]
    if error.remedy:
        lines.append(error.remedy)
    return "\n".join(lines)


def disk_error(error: BaseException) -> QbuildError | None:
    """What a disk refuses, as a failure that a person can mend; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = "make room and run the same command again: finished steps are kept"
    return QbuildError(
        f"{where}{error.strerror}",
        remedy=remedy if error.errno in (errno.ENOSPC, errno.EDQUOT) else None,
    )


def is_for_people(error: BaseException) -> bool:
    """Is this a mistake of the user's (shown without a traceback)?

    `formats`, `quant` and `models` import nothing of qbuild, so their base classes are
    recognised by name and home rather than imported here (importing them costs torch).
    """
    if isinstance(error, QbuildError):
        return True
    homes = {"FormatError": "buildsys.formats", "QuantError": "buildsys.quant"}
    homes["ModelError"] = "buildsys.models"
    return any(
        cls.__module__.startswith(homes[cls.__name__])
        for cls in type(error).__mro__
        if cls.__name__ in homes
    )
