"""The place where bytes change hands between qbuild and its workers: the store.

Whatever travels is an action record and its blobs, as the store and the shared cache hold them
for every build: outputs of a step under its action key, inputs (`Cargo`) under a key of their
content. So all that is promised of those holds here: a blob is digested as it arrives, and a
record behind a URL counts only if it is sealed with the team's key.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from blake3 import blake3

from buildsys.engine.key import canonical
from buildsys.errors import QbuildError, UsageError
from buildsys.store.actions import Action, Entry
from buildsys.store.local import Put, Store
from buildsys.store.place import store_root
from buildsys.store.remote import Remote, StoreTrouble
from buildsys.store.signing import key_file, read_key
from buildsys.store.transport import check_url

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


class ExchangeError(QbuildError):
    """Something could not be given to the other side, or not be got from it."""


class Exchange:
    """The local store, and the shared cache where the other side has another store. May be used
    by several threads."""

    def __init__(self, store: Store, url: str | None, key: bytes | None) -> None:
        self.store = store
        self.url = url
        self._key = key
        self._warnings: list[str] = []
        self._remote: Remote | None = None
        self._lock = threading.Lock()

    def give(self, key: str, action: Action, places: Mapping[str, str], *, own: bool) -> None:
        """Make an action known to the other side. places: path of an entry -> its file; own:
        they are this process's, and may become read-only links into the store.

        Raises ExchangeError.
        """
        try:
            for entry in dict.fromkeys(action.files) if own else ():
                self.store.link_in(places[entry.path], entry)
            self.store.put([Put(key, action, places)])
        except OSError as error:
            raise ExchangeError(f"{self.store.root}: {error.strerror or error}") from error
        if self.store.action(key) is None:
            why = "its disk is nearly full, or a file has changed meanwhile"
            raise ExchangeError(
                f"the store {self.store.root} did not take {_named(action)} ({why})"
            )
        self._share(key, action, anew=own)

    def take(self, key: str, folder: str, *, there: bool = True) -> Action | None:
        """Put what is known under a key below a folder; None where there is nothing. there: ask
        the shared cache too.

        Raises ExchangeError.
        """
        action = self.store.action(key)
        if action is not None and self.store.restore(key, action, folder):
            return action
        remote = self._there() if there else None
        if remote is None:
            return None
        try:
            action = remote.fetch(key)
        except StoreTrouble as error:
            raise ExchangeError(f"{self.store.root}: {error}") from error
        if action is None and self._warnings:
            raise ExchangeError(self._reason())
        if action is None or not self.store.restore(key, action, folder):
            return None
        return action

    def _share(self, key: str, action: Action, anew: bool) -> None:
        remote = self._there()
        if remote is not None and not remote.share(key, action, anew=anew):
            raise ExchangeError(self._reason() or f"{remote.name} does not take {_named(action)}")

    def _there(self) -> Remote | None:
        """The shared cache; a new try where it was given up, for a worker lives long."""
        with self._lock:
            if self.url is None:
                return None
            if self._remote is None or not (self._remote.reads and self._remote.writes):
                self._remote = Remote(self.url, self._key, self.store, self._warnings.append)
            return self._remote

    def _reason(self) -> str:
        told, self._warnings[:] = "; ".join(self._warnings), []
        return told


def open_exchange(url: str | None) -> Exchange:
    """As this process's environment says. Raises UsageError: without a store nothing can change
    hands, and without a key nothing behind a URL can be trusted."""
    root = store_root(os.environ)
    if root is None:
        raise UsageError("--executor dask:// needs the store, and QBUILD_CACHE is empty")
    key = None
    if url is not None:
        check_url(url)
        key = read_key(os.environ)
        if key is None:
            raise UsageError(
                f"to exchange artifacts by {url} a key is needed: there is no "
                f"{key_file(os.environ)}",
                remedy="make one with `qbuild cache key --new`, and give it to every worker",
            )
    try:
        return Exchange(Store(root), url, key)
    except OSError as error:
        raise UsageError(f"the store {root} cannot be used: {error.strerror}") from error


def cargo_action(files: tuple[Entry, ...], folders: tuple[str, ...]) -> tuple[str, Action]:
    """An input as an action, and the key that its content gives it."""
    told: Json = [list(map(list, files)), list(folders)]
    key = blake3(f"qbuild cargo {canonical(told)}".encode(errors="surrogatepass")).hexdigest()
    return key, Action(files, folders, {}, {})


def _named(action: Action) -> str:
    return action.files[0].path if action.files else "an empty folder"
