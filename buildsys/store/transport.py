"""Ways to the shared cache: names in, bytes out. What fsspec knows, and http(s) by PUT and GET.

A transport is used by several threads. Whatever it raises means that the other side cannot be
reached, or refuses.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Protocol

from buildsys.errors import UsageError
from buildsys.store.placing import fsync

CHUNK = 1 << 20
CONNECT_SECONDS = 3.0
READ_SECONDS = 10.0
# Whose objects appear whole or not at all; elsewhere a file is uploaded beside and renamed.
WHOLE_OBJECTS = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
)
Take = Callable[[bytes], object]


class Transport(Protocol):
    """Names are relative paths."""

    def read(self, name: str, take: Take) -> bool:
        """Give the content to `take`, piece by piece. False where there is no such name."""

    def exists(self, name: str) -> bool: ...

    def upload(self, path: str, name: str) -> None:
        """Put a file there; under its name it is whole or not at all."""


def check_url(url: str) -> None:
    """Raises UsageError for a URL that nothing here can open."""
    scheme, found, _ = url.partition("://")
    if not found:
        raise UsageError(
            f"--cache {url} is not a URL", remedy="write for example file:///srv/cache"
        )
    if scheme in ("http", "https"):
        return
    from fsspec.registry import known_implementations

    known = known_implementations.get(scheme)
    if known is None:
        raise UsageError(f"--cache {url}: no driver is known for {scheme}://")
    if importlib.util.find_spec(known["class"].partition(".")[0]) is None:
        extra = " (pip install 'qbuild[s3]')" if scheme == "s3" else ""
        raise UsageError(f"--cache {url}: {known.get('err', 'its driver is missing')}{extra}")


def open_transport(url: str) -> Transport:
    """The transport for a URL that `check_url` has passed."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        from buildsys.store.http_transport import HttpTransport

        return HttpTransport(url)
    return FsspecTransport(url)


class FsspecTransport:
    """Any file system that fsspec has a driver for."""

    def __init__(self, url: str) -> None:
        import fsspec
        from fsspec.core import split_protocol

        self._protocol = split_protocol(url)[0] or "file"
        fs, root = fsspec.core.url_to_fs(url, **_settings(self._protocol))
        self._fs: Any = fs
        if hasattr(fs, "retries"):
            fs.retries = 1  # s3fs tries five times, each longer than the last
        self._root = root.rstrip("/")

    def read(self, name: str, take: Take) -> bool:
        try:
            with self._fs.open(f"{self._root}/{name}", "rb", cache_type="none") as file:
                while chunk := file.read(CHUNK):
                    take(chunk)
        except FileNotFoundError:
            return False
        return True

    def exists(self, name: str) -> bool:
        try:
            self._fs.info(f"{self._root}/{name}")  # exists() says False for every failure
        except FileNotFoundError:
            return False
        return True

    def upload(self, path: str, name: str) -> None:
        target = f"{self._root}/{name}"
        if self._protocol in WHOLE_OBJECTS:
            self._fs.put_file(path, target)
            return
        beside = f"{self._root}/tmp/{os.urandom(8).hex()}"
        self._fs.makedirs(os.path.dirname(beside), exist_ok=True)
        self._fs.makedirs(os.path.dirname(target), exist_ok=True)
        self._fs.put_file(path, beside)
        if self._protocol in ("file", "local"):
            fsync(beside)
            os.replace(beside, target)
        else:
            self._fs.mv(beside, target)


def _settings(protocol: str) -> dict[str, Any]:
    """Short waits where the driver can be told; listings are never kept."""
    if protocol in ("s3", "s3a"):
        waits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        retries = {"retries": {"total_max_attempts": 1}}
        return {"config_kwargs": {**waits, **retries}, "use_listings_cache": False}
    if protocol in ("ssh", "sftp"):
        return {"timeout": CONNECT_SECONDS}
    return {}
