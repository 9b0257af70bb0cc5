"""qbuild's own small files in a build folder: replaced in one step, and nothing half left beside.

Each is first written under its own name with the process's number after it. A killed qbuild may
leave that; the next one that holds the lock removes it.
"""

from __future__ import annotations

import os


def replace_file(path: str, *parts: str) -> None:
    """Put a file of these texts (as UTF-8) in the place of whatever is there.

    Raises OSError: what was there stays then.
    """
    replace_bytes(path, *(part.encode() for part in parts))


def replace_bytes(path: str, *parts: bytes) -> None:
    """As `replace_file`, of bytes."""
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except OSError:
        _remove(temporary)
        raise


def remove_half_written(folder: str) -> None:
    """Remove what killed processes were writing in a folder."""
    for name in os.listdir(folder):
        number = name.rpartition(".")[2]
        # Some are written without the lock. One of this process's own number is not its own yet.
        mine = number == str(os.getpid())
        if name.endswith(".new") or (
            number.isdigit() and (mine or not os.path.exists(f"/proc/{number}"))
        ):
            _remove(f"{folder}/{name}")


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # it is not there, or the next run tries again
