"""Which names may be used on a device, and which folders may be a root there.

What is allowed is listed, rather than what is not: a name that passes means the same to every
shell, every file system and every tool on the way.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from buildsys.devices.errors import DeviceRefused
from buildsys.errors import Location

PART = re.compile(r"[A-Za-z0-9_+@=][A-Za-z0-9._+@=-]*")
ROOT = re.compile(r"/[A-Za-z0-9._+@=/-]+")
LONGEST = 200
# Folders of the system: nothing at all is deployed below these.
SYSTEM = frozenset({
    "/acct", "/apex", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32",
    "/linkerconfig", "/odm", "/oem", "/proc", "/product", "/run", "/sbin", "/sys", "/system",
    "/system_ext", "/usr", "/vendor",
})  # fmt: skip
# Folders that others use too: a folder below them is fine, they themselves are not.
SHARED = frozenset({
    "/", "/data", "/data/app", "/data/data", "/data/local", "/data/local/tmp", "/data/user",
    "/data/user/0", "/home", "/media", "/mnt", "/mnt/sdcard", "/opt", "/root", "/sdcard", "/srv",
    "/storage", "/storage/emulated", "/storage/emulated/0", "/tmp", "/var", "/var/lib", "/var/tmp",
})  # fmt: skip


def checked_path(path: str, location: Location | None = None) -> str:
    """A path below the root as it will be used. Raises DeviceRefused.

    >>> checked_path("models/int8.mllm")
    'models/int8.mllm'
    """
    plain = path.removeprefix("./")
    for part in plain.split("/"):
        if len(part) > LONGEST or not PART.fullmatch(part):
            raise DeviceRefused(
                f"{path!r} cannot be a name on a device",
                remedy="names there have letters, digits and . _ + @ = - and do not begin with "
                "'.' or '-'; none is '..'",
                location=location,
            )
    return plain


def checked_root(root: str, transport: str) -> str:
    """A root as it will be used: absolute for adb and ssh; for `local`, relative to the current
    folder. Raises DeviceRefused for one that is dangerous."""
    if not root.strip():
        raise DeviceRefused("the root on a device cannot be empty")
    if transport == "local":
        root = str(Path(root).expanduser().resolve())
        homes = {str(Path.home()), str(Path.cwd())}
    else:
        homes = set()
    if not ROOT.fullmatch(root):
        raise DeviceRefused(
            f"{root!r} cannot be the root on a device",
            remedy="an absolute path of letters, digits and . _ + @ = - /",
        )
    plain = posixpath.normpath(root).replace("//", "/")
    if ".." in root.split("/") or _is_shared(plain) or plain in homes or _contains(plain, homes):
        raise DeviceRefused(
            f"the root {root!r} is not for qbuild alone",
            remedy="name a folder of its own, for example /data/local/tmp/qbuild",
        )
    return plain


def _is_shared(path: str) -> bool:
    top = "/" + path.split("/")[1]
    is_home = posixpath.dirname(path) == "/home"
    return path in SHARED or top in SYSTEM or is_home


def _contains(path: str, folders: set[str]) -> bool:
    return any(folder.startswith(f"{path}/") for folder in folders)


def refuse_same(paths: dict[str, str]) -> None:
    """Raises DeviceRefused for targets that differ in case only, or where one is a folder of
    another. paths: target -> what goes there."""
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            raise DeviceRefused(
                f"{other} and {path} are one file where case does not count (an SD card)",
                remedy="give one of them another name in `push`",
            )
    for path in paths:
        above = posixpath.dirname(path)
        while above:
            if above.casefold() in seen:
                raise DeviceRefused(f"{seen[above.casefold()]} would be a file and a folder")
            above = posixpath.dirname(above)
