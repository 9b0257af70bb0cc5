"""What a resumable step keeps over a kill: a folder of its own, for one action key.

It is below qbuild's own folder, on the file system of the artifacts, so that the step can move
what it holds into place. Another key finds it empty; a committed step leaves none.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from buildsys.engine.staging import remove_tree

if TYPE_CHECKING:
    from buildsys.engine.folder import BuildFolder


def kept_folder(folder: BuildFolder, step: str, key: str) -> str:
    """The folder of a step under this key; what it kept under another is removed."""
    place = _place(folder, step)
    os.makedirs(f"{place}/{key}", exist_ok=True)
    for name in os.listdir(place):
        if name != key:
            remove_tree(f"{place}/{name}")
    return f"{place}/{key}"


def forget_kept(folder: BuildFolder, step: str) -> None:
    """Nothing is left to resume: the step is committed, or what it read has changed."""
    place = _place(folder, step)
    if os.path.isdir(place):
        remove_tree(place)


def _place(folder: BuildFolder, step: str) -> str:
    return folder.own("kept/" + step.strip("/").replace("%", "%25").replace("/", "%2F"))
