"""Action records: what a step made, under the key of what it was made from.

A record is one line with a seal, a newline, and a JSON object. The seal of a local record is
the BLAKE3 of the rest; a shared one is sealed with a secret key (`signing`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from blake3 import blake3

Json: TypeAlias = Any
VERSION = 1
HEX = frozenset("0123456789abcdef")
DIGEST_DIGITS = 64


class BadRecord(ValueError):
    """A record that is damaged, of another version, or that says what no record may say."""


class Entry(NamedTuple):
    """A file of an output. path: below the build folder; digest: BLAKE3 of its bytes."""

    path: str
    digest: str
    size: int
    executable: bool


class Action(NamedTuple):
    """What a step made. folders: paths of all folders in its outputs; facts: what the engine
    noted of the run; origin: who made it, when and with what."""

    files: tuple[Entry, ...]
    folders: tuple[str, ...]
    facts: Mapping[str, Json]
    origin: Mapping[str, Json]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


def to_json(action: Action) -> Json:
    return {
        "files": [list(entry) for entry in action.files],
        "folders": list(action.folders),
        "facts": dict(action.facts),
        "origin": dict(action.origin),
    }


def encode(key: str, action: Action, **more: Json) -> bytes:
    """The part of a record that is sealed."""
    content = {"v": VERSION, "key": key, **more, "action": to_json(action)}
    return json.dumps(content, separators=(",", ":")).encode()


def decode(key: str, body: bytes) -> tuple[Action, Json]:
    """The action of a record whose seal was right, and the whole object.

    Raises BadRecord: it is of another key or version, or names a path outside of the outputs.
    """
    try:
        content = json.loads(body)
        if content["v"] != VERSION or content["key"] != key:
            raise BadRecord("it is of another version, or of another key")
        found = content["action"]
        files = tuple(_entry(*row) for row in found["files"])
        folders = tuple(_path(path) for path in found["folders"])
        return Action(files, folders, dict(found["facts"]), dict(found["origin"])), content
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"not an action record: {error}") from error


def seal(body: bytes) -> bytes:
    """A local record: against damage, not against malice."""
    return blake3(body).hexdigest().encode() + b"\n" + body


def unseal(data: bytes) -> bytes:
    """What was sealed. Raises BadRecord."""
    first, _, body = data.partition(b"\n")
    if blake3(body).hexdigest().encode() != first:
        raise BadRecord("damaged")
    return body


def is_digest(word: str) -> bool:
    return len(word) == DIGEST_DIGITS and HEX.issuperset(word)


def _entry(path: str, digest: str, size: int, executable: bool) -> Entry:
    sound = isinstance(size, int) and size >= 0 and isinstance(executable, bool)
    if not is_digest(digest) or not sound:
        raise BadRecord(f"{path!r} has no digest, size or mode")
    return Entry(_path(path), digest, size, executable)


def _path(path: str) -> str:
    """A path that stays below the folder that it is joined to. Raises BadRecord."""
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise BadRecord(f"{path!r} is no path of an output")
    return path
