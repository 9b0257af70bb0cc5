"""One deploy or run at a time on a device, whoever asks and from wherever.

The lock is a flock on the device, held by a shell there whose input is a pipe from here. When
this qbuild ends, however it ends, or the link is lost, that shell ends and the lock is free:
there is no stale lock, and nothing to break.
"""

from __future__ import annotations

import getpass
import os
import time
from typing import TYPE_CHECKING

from buildsys.devices.errors import CommandFailed, DeviceError
from buildsys.devices.remote_folder import OWN, RemoteFolder
from buildsys.devices.transport import Started, quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

LOCK = """umask 022; mkdir -p -- {root} && cd -- {root} && mkdir -p {own} || exit 1
exec 9>>{own}/lock || exit 1
if command -v flock >/dev/null 2>&1; then
    flock -n 9 9>&9 || {{ echo "busy $(cat {own}/owner 2>/dev/null)"; flock 9 9>&9 || exit 1; }}
elif ! mkdir {own}/lock.held; then
    echo "busy $(cat {own}/owner 2>/dev/null)"
    echo "this device has no flock: remove {own}/lock.held if that qbuild is gone" >&2
    exit 75
else
    trap 'rmdir {own}/lock.held' EXIT
fi
printf '%s\\n' {owner} > {own}/owner
echo locked
cat >/dev/null 9>&9"""


class DeviceLock:
    """Held inside `with`, which creates the root. say: is told for whom it waits."""

    def __init__(self, folder: RemoteFolder, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._held: Started | None = None

    def __enter__(self) -> DeviceLock:
        script = LOCK.format(own=OWN, owner=quoted(who()), root=quoted(self._folder.root))
        held = Started(self._folder.transport, script)
        try:
            self._wait(held)
        except BaseException:
            held.close()
            raise
        self._held = held
        return self

    def _wait(self, held: Started) -> None:
        said = b""
        while line := held.stdout.readline():
            said += line
            word, _, rest = line.decode(errors="replace").strip().partition(" ")
            if word == "locked":
                return
            if word == "busy":
                self._say(f"waiting for {rest or 'another qbuild'}")
        _, code = held.end(said)
        text = held.error_text()
        raise CommandFailed(f"{self._folder.transport.name}: cannot lock: {text}", code, text)

    def check(self) -> None:
        """Raises DeviceError where the lock was lost with the link."""
        if self._held is not None and self._held.process.poll() is not None:
            raise DeviceError(f"{self._folder.transport.name}: the link was lost")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._held is not None:
            self._held.close_input()
            self._held.stdout.read()  # its end: the lock is free when this returns
            self._held.close()
            self._held = None


def who() -> str:
    """Who holds the lock, for the one who waits."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"qbuild of {getpass.getuser()} on {os.uname().nodename}, {os.getpid()}, since {since}"
