"""Brings results back: whole, compared by digest, and renamed into place here too."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.devices.errors import CommandFailed, DeviceError
from buildsys.devices.transport import Started, quoted

if TYPE_CHECKING:
    from buildsys.devices.remote_folder import RemoteFolder

BLOCK = 1 << 20
FETCH = """[ -f {path} ] && [ ! -L {path} ] || {{ echo "it is not there" >&2; exit 1; }}
sha256sum -- {path} | cut -d ' ' -f 1 && stat -c %s -- {path} && cat -- {path}"""


def pull(folder: RemoteFolder, there: str, into: Path, here: str) -> Path:
    """Copy one file from the device to `into`/`here`; returns its path.

    Raises DeviceError where it is not there, changes meanwhile, the link is lost, or it cannot be
    written here; what was here before is then untouched.
    """
    target = into / here
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    started = Started(folder.transport, folder.enter(FETCH.format(path=quoted(f"./{there}"))))
    try:
        started.close_input()
        with writing(target):
            digest = _receive(started, temporary, there)
        if digest is not None:
            raise DeviceError(f"{there} changed while it was fetched", remedy="run it again")
        with writing(target):
            temporary.replace(target)
    finally:
        started.close()
        temporary.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What this machine's disk says against writing a file, as a DeviceError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DeviceError(
            f"cannot write {path} on this machine: {error.strerror or error}",
            remedy="make room here and run it again" if full else None,
        ) from error


def _receive(started: Started, temporary: Path, there: str) -> str | None:
    """Write what comes; the digest that it should have had, None where it has it."""
    head = [started.stdout.readline(), started.stdout.readline()]
    if not head[1].strip().isdigit():
        _, code = started.end(b"".join(head) + started.stdout.read())
        said = started.error_text()
        raise CommandFailed(f"cannot fetch {there}: {said}", code, said)
    digest, left = head[0].strip().decode(), int(head[1])
    hasher = hashlib.sha256()
    with temporary.open("wb") as file:
        while left and (block := started.stdout.read(min(BLOCK, left))):
            hasher.update(block)
            file.write(block)
            left -= len(block)
        file.flush()
        os.fsync(file.fileno())
    started.end(started.stdout.read())
    return None if hasher.hexdigest() == digest and not left else digest
