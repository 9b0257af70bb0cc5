"""Checkpoints in several files: an index (`*.index.json`) or all shards of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import JoinedSource, TensorSource

Opener: TypeAlias = Callable[[Path], TensorSource]


def open_index(path: str | PathLike[str], open_shard: Opener) -> JoinedSource:
    """The checkpoint of an index file: `{"weight_map": {tensor: shard file}}`.

    The order is that of the shards' names, and within a shard that of its file. Tensors that
    the index does not name are left out, as transformers does.
    Raises FormatError for a shard or a tensor that is missing.
    """
    index = Path(path)
    weight_map, metadata = _read_index(index)
    files = sorted(set(weight_map.values()))
    for file in files:
        if not (index.parent / file).is_file():
            raise FormatError(
                f"does not exist, and {index.name} names it",
                file=index.parent / file,
                remedy="The download is incomplete: fetch what is missing.",
            )
    shards = {file: open_shard(index.parent / file) for file in files}
    present = {file: set(shard.names()) for file, shard in shards.items()}
    for name, file in weight_map.items():
        if name not in present[file]:
            raise FormatError(
                f"{index.name} says that it is here, and it is not",
                file=index.parent / file,
                tensor=name,
                remedy="Index and shards are of different versions: download both again.",
            )
    owners = {
        name: shard
        for file, shard in shards.items()
        for name in shard.names()
        if weight_map.get(name) == file
    }
    return JoinedSource(index, owners, metadata)


def open_shards(folder: Path, files: Sequence[Path], open_shard: Opener) -> JoinedSource:
    """All tensors of the given files, in their order. A name in two files is an error."""
    owners: dict[str, TensorSource] = {}
    metadata: dict[str, object] = {}
    for file in files:
        shard = open_shard(file)
        metadata.update(shard.metadata)
        for name in shard.names():
            if name in owners:
                raise FormatError(f"is also in {owners[name].path.name}", file=file, tensor=name)
            owners[name] = shard
    return JoinedSource(folder, owners, metadata)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, object]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON ({error})", file=path) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("is missing or empty", file=path, field="weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise FormatError(
                f"names the shard {file!r}, which is not a file below this folder",
                file=path,
                tensor=name,
            )
    metadata = content.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _stays_inside(file: str) -> bool:
    parts = PurePosixPath(file)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts
