"""Where `qbuild toolchain install` puts a toolchain, and whether it is there and whole.

    $QBUILD_CACHE/toolchains/NAME/ID/          what was installed
    $QBUILD_CACHE/toolchains/NAME/ID.json      written last: without it nothing above counts
    $QBUILD_CACHE/toolchains/NAME/ID.log       what the installer's programs said
    $QBUILD_CACHE/toolchains/NAME/lock

ID is a digest of the `install` section and of the kind of machine: another pin is another
folder, and one that is in use never changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from blake3 import blake3

from buildsys.store.place import store_root

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

ID_LENGTH = 16  # hexadecimal digits


def folder_for(name: str, described: Json, environment: Mapping[str, str]) -> str | None:
    """Where the toolchain would be installed; None where it cannot be: no `install`, no cache."""
    root = store_root(environment)
    if root is None or "install" not in described or not name:
        return None
    content = json.dumps([described["install"], os.uname().machine], sort_keys=True)
    return f"{root}/toolchains/{name}/{blake3(content.encode()).hexdigest()[:ID_LENGTH]}"


def mark_of(folder: str) -> str:
    """The file that says that an installation is whole."""
    return f"{folder}.json"


def installed_folder(name: str, described: Json, environment: Mapping[str, str]) -> str | None:
    """The folder that holds the toolchain, installed and whole; else None."""
    folder = folder_for(name, described, environment)
    return folder if folder is not None and os.path.isfile(mark_of(folder)) else None
