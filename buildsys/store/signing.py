"""The secret that a team's shared records are sealed with, so that nobody else can make one.

HMAC-SHA256 with a key of 32 bytes, from $QBUILD_CACHE_KEY or ~/.config/qbuild/cache.key, as 64
hexadecimal digits. Who has the key may read and write; who has not only reads (see `remote`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from buildsys.errors import UsageError

VARIABLE = "QBUILD_CACHE_KEY"
BYTES = 32


def key_file(environment: Mapping[str, str]) -> str:
    base = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "qbuild", "cache.key")


def read_key(environment: Mapping[str, str]) -> bytes | None:
    """The key; None where there is none.

    Raises UsageError for one that is no key, or that others may read.
    """
    word = environment.get(VARIABLE)
    if word is not None:
        return _parse(word, f"${VARIABLE}")
    path = key_file(environment)
    try:
        with open(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            word = file.read()
    except FileNotFoundError:
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path} can be read by others", remedy=f"chmod 600 {path}")
    return _parse(word, path)


def make_key(environment: Mapping[str, str]) -> str:
    """Make a key file; its path. Raises UsageError where there is one."""
    path = key_file(environment)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UsageError(f"there is a key already: {path}") from error
    with open(fd, "w") as file:
        file.write(os.urandom(BYTES).hex() + "\n")
    return path


def sign(key: bytes, body: bytes) -> bytes:
    """The body with its seal in a line before it."""
    import hmac  # it loads OpenSSL: not for a build that shares nothing

    return hmac.digest(key, body, "sha256").hex().encode() + b"\n" + body


def verified(key: bytes | None, data: bytes) -> bytes | None:
    """The body, if its seal is of this key; without a key nothing can be checked."""
    seal, _, body = data.partition(b"\n")
    if key is None:
        return body
    import hmac

    return body if hmac.compare_digest(sign(key, body).partition(b"\n")[0], seal) else None


def _parse(word: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(word.strip())
    except ValueError:
        key = b""
    if len(key) != BYTES:
        remedy = "make one with `qbuild cache key --new`, and give it to those who share the cache"
        raise UsageError(f"{where} is not a key of {2 * BYTES} hexadecimal digits", remedy=remedy)
    return key
