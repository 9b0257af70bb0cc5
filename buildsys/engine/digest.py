"""What is digested: files, folders, and the parts of a model.

The digest of a file is the BLAKE3 of its bytes; of an executable file in an artifact, that and
"+x". The digest of a folder is the BLAKE3 of its sorted list of (relative path, executable bit,
content), so that neither the order of creation nor times nor owners count.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

from buildsys.errors import QbuildError, RecipeError

if TYPE_CHECKING:
    from buildsys.engine.stamps import Stamps
    from buildsys.plan.graph import Source

EXECUTABLE = "+x"
# What git itself rewrites at every `git status`; nothing that a step should read.
NOT_CONTENT = frozenset({".git"})
PARTS: dict[str, tuple[str, ...]] = {
    "config": ("config.json", "generation_config.json"),
    "weights": ("*.safetensors", "*.safetensors.index.json", "*.gguf"),
    "tokenizer": (
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
        "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    ),
    "processor": (
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "image_processor_config.json", "chat_template.*",
    ),
}  # fmt: skip
# Read only where there is no safetensors file: both hold the same tensors.
PICKLED_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt")


class UnfitContent(QbuildError):
    """A folder holds something that no digest can stand for: a link, a device, a dead link."""


def artifact_digest(stamps: Stamps, name: str) -> str | None:
    """The digest of an artifact; None where there is none of that kind (file or folder).

    Raises UnfitContent for a link or a device inside a folder.
    """
    if name[-1] == "/":
        place = name[:-1]
        mode = stamps.mode(place, follow=False)
        if mode is None or not stat.S_ISDIR(mode):
            return None
        return folder_digest(stamps, place, follow=False)
    digest = stamps.file(name, follow=False)
    mode = stamps.mode(name, follow=False)
    return with_mode(digest, mode) if digest is not None and mode is not None else None


def with_mode(digest: str, mode: int) -> str:
    return digest + EXECUTABLE if mode & stat.S_IXUSR else digest


def folder_digest(stamps: Stamps, place: str, *, follow: bool) -> str:
    """The digest of a folder. follow: links count as what they lead to (sources); otherwise
    they are refused (artifacts), for what they lead to is outside of the artifact.

    Raises UnfitContent, naming the path.
    """
    hasher = blake3()
    for relative, found in walk(stamps.path(place), follow=follow):
        digest = None
        if not stat.S_ISDIR(found.st_mode):
            stamps.saw(f"{place}/{relative}", found)
            digest = stamps.file(f"{place}/{relative}", follow=follow)
        hasher.update(folder_entry(relative, found.st_mode, digest))
    return hasher.hexdigest()


def folder_entry(relative: str, mode: int, digest: str | None) -> bytes:
    """What one thing in a folder adds to the folder's digest (digest None: a folder in it)."""
    content = "/" if digest is None else with_mode(digest, mode)
    return f"{relative}\0{content}\0".encode(errors="surrogateescape")


def walk(folder: str, *, follow: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a folder, sorted: path relative to it, and what stat says.

    Raises UnfitContent for what is neither file nor folder, dead links, circles of links, and
    (without follow) links.
    """
    yield from _walk(folder, "", follow, ())


def _walk(
    folder: str, prefix: str, follow: bool, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name in NOT_CONTENT:
            continue
        if entry.is_symlink() and not follow:
            raise UnfitContent(f"{entry.path} is a link", remedy="put the file itself there")
        try:
            found = entry.stat(follow_symlinks=follow)
        except FileNotFoundError as error:
            raise UnfitContent(f"{entry.path} is a link that leads nowhere") from error
        yield prefix + entry.name, found
        if stat.S_ISDIR(found.st_mode):
            here = (found.st_dev, found.st_ino)
            if here in above:
                raise UnfitContent(f"{entry.path} leads back to a folder that it is in")
            yield from _walk(entry.path, f"{prefix}{entry.name}/", follow, (*above, here))
        elif not stat.S_ISREG(found.st_mode):
            raise UnfitContent(f"{entry.path} is neither a file nor a folder")


def source_entries(stamps: Stamps, source: Source, parts: Sequence[str]) -> list[list[str | None]]:
    """What a source is, as [label, digest] pairs; a model's by the parts that are read. The
    digest is None for a hub model that has not been fetched.

    Raises RecipeError, at the source's place in the recipe, for what is not there.
    """
    if source.kind == "model":
        return _model_entries(stamps, source, parts or tuple(PARTS))
    return [
        [source.name if role == "path" else f"{source.name}:{role}", _content(stamps, source, path)]
        for role, path in source.paths.items()
    ]


def _content(stamps: Stamps, source: Source, path: str) -> str:
    mode = stamps.mode(path, follow=True)
    if mode is not None and stat.S_ISDIR(mode):
        return folder_digest(stamps, path, follow=True)
    digest = stamps.file(path, follow=True)
    if digest is None:
        raise _missing(source, path)
    return digest


def _missing(source: Source, path: str) -> RecipeError:
    from buildsys.plan.missing import missing_parts  # knows the nearest names, and what to install

    errors = missing_parts(source)
    if errors:
        return errors[0]
    return RecipeError(f"source '{source.name}': there is no {path}", location=source.where)


def _model_entries(stamps: Stamps, source: Source, parts: Sequence[str]) -> list[list[str | None]]:
    path = source.paths["path"]
    if not path:
        return [[f"{source.name}:{part}", None] for part in parts]
    mode = stamps.mode(path, follow=True)
    if mode is None:
        raise _missing(source, path)
    if not stat.S_ISDIR(mode):
        return [[source.name, _content(stamps, source, path)]]
    names = sorted(os.listdir(path))
    return [
        [f"{source.name}:{part}", _files_digest(stamps, path, names_of(part, names))]
        for part in parts
    ]


def names_of(part: str, names: Sequence[str]) -> list[str]:
    """Which of the files of a model folder belong to a part."""
    patterns = PARTS[part]
    if part == "weights" and not any(name.endswith((".safetensors", ".gguf")) for name in names):
        patterns += PICKLED_WEIGHTS
    return [name for name in names if any(_matches(name, each) for each in patterns)]


def _matches(name: str, pattern: str) -> bool:
    """A name, or one with a star at an end. (fnmatch compiles a regular expression for each.)"""
    if pattern[0] == "*":
        return name.endswith(pattern[1:])
    return name.startswith(pattern[:-1]) if pattern[-1] == "*" else name == pattern


def _files_digest(stamps: Stamps, folder: str, names: Sequence[str]) -> str:
    hasher = blake3()
    for name in names:
        digest = stamps.file(f"{folder}/{name}", follow=True)
        hasher.update(f"{name}\0{digest}\0".encode(errors="surrogateescape"))
    return hasher.hexdigest()


def source_files(stamps: Stamps, source: Source, parts: Sequence[str]) -> Iterator[str]:
    """The places of all files whose digests `source_entries` takes, of a folder's own folders,
    and of the folder itself (of a model only where it is a link: what lies beside its parts
    does not count)."""
    if source.kind == "model":
        yield from _model_files(stamps, source.paths["path"], parts or tuple(PARTS))
        return
    for path in source.paths.values():
        yield path
        mode = stamps.mode(path, follow=True)
        if mode is not None and stat.S_ISDIR(mode):
            yield from (f"{path}/{relative}" for relative, _ in walk(path, follow=True))


def _model_files(stamps: Stamps, path: str, parts: Sequence[str]) -> Iterator[str]:
    mode = stamps.mode(path, follow=True) if path else None
    if mode is None:
        return
    if not stat.S_ISDIR(mode) or os.path.islink(path):
        yield path
    if stat.S_ISDIR(mode):
        names = sorted(os.listdir(path))
        yield from (f"{path}/{name}" for part in parts for name in names_of(part, names))


def artifact_files(stamps: Stamps, name: str) -> Iterator[str]:
    """The names of all files of an artifact; none where it is a folder that is not there."""
    if name[-1] != "/":
        yield name
        return
    for relative, found in _inside(stamps, name):
        if stat.S_ISREG(found.st_mode):
            yield name + relative


def artifact_folders(stamps: Stamps, name: str) -> Iterator[str]:
    """The names of an artifact that is a folder, and of the folders in it.

    Raises UnfitContent.
    """
    yield name
    for relative, found in _inside(stamps, name):
        if stat.S_ISDIR(found.st_mode):
            yield name + relative


def _inside(stamps: Stamps, name: str) -> Iterator[tuple[str, os.stat_result]]:
    place = stamps.path(name[:-1])
    return walk(place, follow=False) if os.path.isdir(place) else iter(())
