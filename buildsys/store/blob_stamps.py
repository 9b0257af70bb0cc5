"""What stat said of a blob when its bytes were last known to be right.

A blob that shares its inode with artifacts can be written through their names, and link(2),
unlink(2) and rename(2) of any of them change its ctime. The store notes the stamp after each
change of its own; a blob with any other stamp is in doubt, and is read again before it is used.
"""

from __future__ import annotations

import itertools
import os
from typing import TypeAlias

# dev, inode, size, mtime_ns, ctime_ns
Stamp: TypeAlias = tuple[int, ...]
_count = itertools.count()


def stamp_of(found: os.stat_result) -> Stamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def noted(root: str, digest: str) -> Stamp | None:
    """The stamp under which the bytes of a blob are known to be right; None: nobody knows."""
    try:
        with open(_place(root, digest), "rb") as file:
            return tuple(map(int, file.read().split()))
    except (OSError, ValueError):
        return None


def note(root: str, digest: str, stamp: Stamp) -> None:
    """The bytes are right now. Not synced: a note that is lost, or torn, costs one reading."""
    place = _place(root, digest)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    temporary = f"{place}.{os.getpid()}-{next(_count)}"
    with open(temporary, "wb") as file:
        file.write(b"%d %d %d %d %d\n" % stamp)
    os.replace(temporary, place)


def forget(root: str, digest: str) -> None:
    try:
        os.unlink(_place(root, digest))
    except FileNotFoundError:
        return  # small blobs have none


def vouches(root: str, digest: str, stamp: Stamp) -> bool:
    """Does the store know that a file of this stamp has the bytes of this digest? Asked of
    artifacts whose ctime alone has changed: another folder may have linked the same blob."""
    return noted(root, digest) == stamp


def _place(root: str, digest: str) -> str:
    return f"{root}/stamps/{digest[:2]}/{digest}"
