"""Staging folders: where a step writes, and what is taken out of them.

A step gets a fresh folder and writes its outputs there under their own names. Only declared
outputs are taken; whatever else it leaves is removed with the folder. An output is refused
that is missing, of the wrong kind (file or folder), a link or a device, holds one, or is an
empty folder: a program that failed without saying so leaves those.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import NamedTuple

from blake3 import blake3

from buildsys.engine.digest import UnfitContent, folder_entry, walk, with_mode
from buildsys.errors import QbuildError
from buildsys.identity import hash_file


class UnfitOutput(QbuildError):
    """A step ended well and left something that cannot be its output."""


class Output(NamedTuple):
    """One output in its staging folder. path: its name below the build folder; files: absolute
    paths of all files in it; folders: of all folders, the outermost last."""

    path: str
    staged: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    size: int


class Staging:
    """The staging folders of one build, numbered. One that was emptied is used again: making
    and removing thousands of folders takes longer than thousands of small steps. Another build
    has others: what a program of a killed build may still write gets in nobody's way.

    Invariant: nothing but them is below `root`, and those in `_empty` are empty.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._own = os.urandom(4).hex()
        self._count = 0
        self._empty: list[str] = []

    def fresh(self, outputs: Iterable[str]) -> str:
        """An empty folder for one step, with the folders that its outputs lie in."""
        if self._empty:
            folder = self._empty.pop()
        else:
            self._count += 1
            folder = f"{self._root}/{self._own}-{self._count}"
            os.makedirs(folder)
        for path in outputs:
            if "/" in path.rstrip("/"):
                os.makedirs(os.path.dirname(f"{folder}/{path.rstrip('/')}"), exist_ok=True)
        return folder

    def discard(self, folder: str) -> None:
        """Remove all that is left in a folder of a step whose processes are gone."""
        sweep(folder)
        self._empty.append(folder)

    def close(self) -> None:
        """Remove them all."""
        sweep(self._root)
        self._empty.clear()


def sweep(folder: str) -> None:
    """Remove everything in a folder, if it is there; a killed build leaves staging folders."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        remove_tree(f"{folder}/{name}")


def remove_tree(path: str) -> None:
    """Remove a file or a folder, also one that its maker has made unreadable."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    try:
        os.rmdir(path)  # most are empty by now
        return
    except OSError:
        import shutil  # 5 ms: it pulls every kind of compression in

    try:
        shutil.rmtree(path)
    except PermissionError:
        for folder, _, _ in os.walk(path):
            os.chmod(folder, stat.S_IRWXU)
            for name in os.listdir(folder):
                if os.path.isdir(f"{folder}/{name}") and not os.path.islink(f"{folder}/{name}"):
                    os.chmod(f"{folder}/{name}", stat.S_IRWXU)
        shutil.rmtree(path)


def collect(folder: str, paths: Iterable[str]) -> list[Output]:
    """The declared outputs of a step that has ended. Raises UnfitOutput."""
    return [_look_at(path, f"{folder}/{path.rstrip('/')}") for path in paths]


def _look_at(path: str, staged: str) -> Output:
    try:
        found = os.lstat(staged)
    except FileNotFoundError as error:
        raise UnfitOutput(f"the step ended well, but did not make {path}") from error
    wanted, kind = ("folder", stat.S_ISDIR) if path.endswith("/") else ("file", stat.S_ISREG)
    if not kind(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "something else"
        raise UnfitOutput(f"{path} should be a {wanted}, and the step made {what}")
    if wanted == "file":
        return Output(path, staged, (staged,), (), found.st_size)
    try:
        inside = [(f"{staged}/{name}", each) for name, each in walk(staged, follow=False)]
    except UnfitContent as error:
        message = error.message.removeprefix(f"{staged}/")
        raise UnfitOutput(f"{path}: {message}; an artifact holds files and folders") from error
    files = tuple(name for name, each in inside if stat.S_ISREG(each.st_mode))
    if not files:
        raise UnfitOutput(f"the step ended well, but left {path} empty")
    folders = tuple(name for name, each in inside if stat.S_ISDIR(each.st_mode))
    size = sum(each.st_size for _, each in inside if stat.S_ISREG(each.st_mode))
    return Output(path, staged, files, (*reversed(folders), staged), size)


def digest_output(output: Output, hash_one: Callable[[str], str] = hash_file) -> dict[str, str]:
    """Digests of an output (under its own path) and of every file in it (relative to the build
    folder), read from the staging folder. Touches no shared state: it may run in a thread."""
    if not output.path.endswith("/"):
        mode = os.lstat(output.staged).st_mode
        return {output.path: with_mode(hash_one(output.staged), mode)}
    found: dict[str, str] = {}
    hasher = blake3()
    for relative, each in walk(output.staged, follow=False):
        digest = None
        if not stat.S_ISDIR(each.st_mode):
            digest = found[output.path + relative] = hash_one(f"{output.staged}/{relative}")
        hasher.update(folder_entry(relative, each.st_mode, digest))
    return {**found, output.path: hasher.hexdigest()}
