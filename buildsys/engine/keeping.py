"""What a resumable step keeps over a kill: a folder of its own, for one action key.

It is below qbuild's own folder, on the file system of the artifacts, so that the step can move
what it holds into place. Another key finds it empty; a committed step leaves none. Nor is it
trusted when anything that the step reads was written or touched since it began, even if that
was undone: some of what is kept may be made from what was there in between.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from buildsys.engine.digest import walk
from buildsys.engine.folder import read_json, write_json
from buildsys.engine.staging import remove_tree
from buildsys.engine.stamps import stamp_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from buildsys.engine.folder import BuildFolder
    from buildsys.plan.graph import Json

READ = "read"  # the stamps of what the step reads, beside what it keeps


def trust_kept(folder: BuildFolder, step: str, stamps: Json) -> None:
    """What a step kept is good for the stamps that its inputs had when it first began: under
    others it is removed, and these are noted."""
    noted = f"{_place(folder, step)}/{READ}"
    if read_json(noted) != stamps:
        forget_kept(folder, step)
        os.makedirs(_place(folder, step))
        write_json(noted, stamps)


def stamps_below(places: Iterable[str]) -> Json:
    """Stamps of files and folders, of all that is in those folders, and of links to any of it."""
    found: list[Json] = []
    for place in places:
        paths = [place]
        if os.path.isdir(place):
            paths += [f"{place}/{relative}" for relative, _ in walk(place, follow=True)]
        found += [[path, stamp_of(os.lstat(path)), stamp_of(os.stat(path))] for path in paths]
    return found


def kept_folder(folder: BuildFolder, step: str, key: str) -> str:
    """The folder of a step under this key; what it kept under another is removed."""
    place = _place(folder, step)
    os.makedirs(f"{place}/{key}", exist_ok=True)
    for name in os.listdir(place):
        if name not in (key, READ):
            remove_tree(f"{place}/{name}")
    return f"{place}/{key}"


def forget_kept(folder: BuildFolder, step: str) -> None:
    """Nothing is left to resume: the step is committed, or what it read has changed."""
    place = _place(folder, step)
    if os.path.isdir(place):
        remove_tree(place)


def _place(folder: BuildFolder, step: str) -> str:
    return folder.own("kept/" + step.strip("/").replace("%", "%25").replace("/", "%2F"))
