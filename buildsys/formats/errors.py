"""Mistakes in files that a person can mend: which file, which tensor or field, what to do."""

from __future__ import annotations

from os import PathLike, fspath


class Misfit(Exception):
    """Something in a file, or on its way into one, that a person can mend."""

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        tensor: str | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else fspath(file)
        self.tensor = tensor
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        """`FILE: error: tensor 'NAME': message`, and the remedy on a line of its own."""
        place = "error" if self.file is None else f"{self.file}: error"
        subject = ""
        if self.tensor is not None:
            subject = f"tensor {self.tensor!r}: "
        elif self.field is not None:
            subject = f"field {self.field!r}: "
        remedy = f"\n{self.remedy}" if self.remedy else ""
        return f"{place}: {subject}{self.message}{remedy}"


class FormatError(Misfit):
    """A file is not what it should be, or cannot hold what it is asked to hold."""
