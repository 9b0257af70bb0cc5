"""`dask://HOST:PORT` and `dask://local?workers=N`: what they say."""

from __future__ import annotations

import importlib.util
import urllib.parse
from typing import NamedTuple

from buildsys.errors import UsageError

SCHEME = "dask"
FORMS = "dask://HOST:PORT[?wait=SECONDS] or dask://local[?workers=N]"
WORKERS = 2
WAIT = 10.0


class Address(NamedTuple):
    """scheduler: "tcp://HOST:PORT", or "" for one that is started here, with so many `workers`.
    wait: seconds that a first worker may take to appear."""

    scheduler: str
    workers: int
    wait: float


def parse(url: str) -> Address:
    """Raises UsageError for what is no such URL, and where Dask is not installed."""
    found = urllib.parse.urlsplit(url)
    if found.scheme != SCHEME or found.path.strip("/"):
        raise UsageError(f"'{url}' is no executor", remedy=f"Known: local, {FORMS}.")
    given = dict(urllib.parse.parse_qsl(found.query, keep_blank_values=True))
    known = {"workers"} if found.netloc == "local" else {"wait"}
    if given.keys() - known:
        raise UsageError(
            f"{url}: unknown word '{min(given.keys() - known)}'", remedy=f"Known: {FORMS}."
        )
    require_dask()
    if found.netloc == "local":
        return Address("", int(_number(url, given.get("workers", str(WORKERS)), least=1)), 60.0)
    if not found.hostname or _port(found) is None:
        raise UsageError(f"{url}: a host and a port are needed", remedy=f"Known: {FORMS}.")
    return Address(f"tcp://{found.netloc}", 0, _number(url, given.get("wait", str(WAIT)), least=0))


def require_dask() -> None:
    """Raises UsageError where it is not installed. Imports nothing of it."""
    if importlib.util.find_spec("distributed") is None:
        raise UsageError("Dask is not installed", remedy="pip install 'qbuild[dask]'")


def _port(found: urllib.parse.SplitResult) -> int | None:
    try:
        return found.port
    except ValueError:
        return None


def _number(url: str, word: str, *, least: float) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not least <= value < 1e6:
        raise UsageError(
            f"{url}: '{word}' is not a number of {least} or more", remedy=f"Known: {FORMS}."
        )
    return value
