"""Reads config.json of a Hugging Face model; what is missing or wrong is told by its field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from buildsys.formats.errors import FormatError


@dataclass(frozen=True)
class ConfigFile:
    """The fields of a configuration; a nested section knows its place (`vision_config.depth`).

    Every getter raises FormatError for a field of the wrong type, and for a missing one where
    no default is given. A field that is null counts as missing.
    """

    path: Path
    fields: Mapping[str, object]
    prefix: str = ""

    def has(self, field: str) -> bool:
        return self.fields.get(field) is not None

    def integer(self, field: str, default: int | None = None) -> int:
        value = self._get(field, default)
        if type(value) is not int:
            raise self.wrong(field, f"is {value!r}, not an integer")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._get(field, default)
        if type(value) not in (int, float):
            raise self.wrong(field, f"is {value!r}, not a number")
        return float(str(value))

    def text(self, field: str, default: str | None = None) -> str:
        value = self._get(field, default)
        if not isinstance(value, str):
            raise self.wrong(field, f"is {value!r}, not a text")
        return value

    def flag(self, field: str, default: bool | None = None) -> bool:
        value = self._get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, f"is {value!r}, neither true nor false")
        return value

    def section(self, field: str) -> ConfigFile:
        value = self._get(field, None)
        if not isinstance(value, dict):
            raise self.wrong(field, f"is {value!r}, not an object")
        return ConfigFile(self.path, value, f"{self.prefix}{field}.")

    def wrong(self, field: str, message: str, remedy: str | None = None) -> FormatError:
        """The error about a field, to be raised by who finds its value impossible."""
        return FormatError(message, file=self.path, field=f"{self.prefix}{field}", remedy=remedy)

    def _get(self, field: str, default: object) -> object:
        value = self.fields.get(field)
        if value is not None:
            return value
        if default is not None:
            return default
        near = difflib.get_close_matches(field, self.fields, n=1)
        remedy = f"There is a field {near[0]!r}." if near else None
        raise self.wrong(field, "is missing", remedy)


def read_config(path: str | PathLike[str]) -> ConfigFile:
    """Read a config.json, or the one of a folder.

    Raises FormatError where there is none, where it is not JSON (with line and column), and
    where it is not an object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    content = read_json(file)
    if not isinstance(content, dict):
        raise FormatError("is not a JSON object", file=file)
    return ConfigFile(file, content)


def read_json(path: Path) -> object:
    """Read a JSON file. Raises FormatError with line and column of the fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise FormatError(f"is not JSON: {error.msg} at {place}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON: {error}", file=path) from error
