"""What qbuild believes to be on a device: written last, so that it never says too much.

An entry is believed only while the file's size and stamp are what they were after the rename:
whoever edits a file on the device changes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.devices.errors import DeviceRefused

if TYPE_CHECKING:
    from buildsys.devices.remote_folder import Entry
    from buildsys.plan.graph import Json

VERSION = 1


class Placed(NamedTuple):
    """One file as it was right after its rename. stamp: inode, mode and times there."""

    sha256: str
    size: int
    stamp: str


class Manifest(NamedTuple):
    """files: path below the root -> what it is. caches: cache file -> the key of what it
    belongs to."""

    files: Mapping[str, Placed]


EMPTY = Manifest({})


def read_manifest(text: str | None) -> Manifest:
    """Nothing is believed where there is no manifest, or it is damaged.

    Raises DeviceRefused for one that a newer qbuild wrote.
    """
    if text is None:
        return EMPTY
    try:
        data = json.loads(text)
        version = data["version"]
        if isinstance(version, int) and version > VERSION:
            raise DeviceRefused(
                f"the device was deployed to by a newer qbuild (manifest version {version})",
                remedy="use that version, or remove the folder .qb on the device",
            )
        files = {path: _placed(row) for path, row in data["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return EMPTY
    return Manifest(files) if version == VERSION else EMPTY


def _placed(row: Json) -> Placed:
    placed = Placed(row["sha256"], row["size"], row["stamp"])
    if not (isinstance(placed.sha256, str) and isinstance(placed.size, int)):
        raise TypeError("not a manifest entry")
    return placed


def write_manifest(manifest: Manifest) -> str:
    files = {path: placed._asdict() for path, placed in sorted(manifest.files.items())}
    return json.dumps({"version": VERSION, "files": files}, indent=1)


def believed(placed: Placed | None, entry: Entry | None) -> bool:
    """Is the file on the device still the one that was placed?"""
    return placed is not None and entry is not None and placed[1:] == tuple(entry)
