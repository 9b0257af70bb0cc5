"""What the store holds, whether it is right, and what may go."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from buildsys.identity import hash_file
from buildsys.store import blob_stamps
from buildsys.store.actions import Entry

if TYPE_CHECKING:
    from buildsys.store.local import Store

# A build that runs uses things that no journal names yet, and writes blobs before records.
GRACE = 3600.0  # seconds
ABANDONED = 86400.0  # seconds after which nobody writes to a temporary file any more
# Build folder -> keys of the records that it uses.
KeysInUse = Callable[[str], Collection[str]]


class Contents(NamedTuple):
    """records, blobs: how many; size: bytes of all blobs; shared: of those that have another
    name in a build folder; folders: registered build folders that still exist."""

    records: int
    blobs: int
    size: int
    shared: int
    folders: tuple[str, ...]


class Removed(NamedTuple):
    """size: bytes of the blobs that are gone; kept: bytes of those that build folders use."""

    records: int
    blobs: int
    size: int
    kept: int


class Verified(NamedTuple):
    """wrong: digests of blobs whose bytes are others, now removed; lame: keys of records that
    named one of them, or one that is not there, now removed."""

    blobs: int
    size: int
    wrong: tuple[str, ...]
    lame: tuple[str, ...]


def contents(store: Store) -> Contents:
    found = [each for _, each in store.blobs()]
    shared = sum(each.st_size for each in found if each.st_nlink > 1)
    folders = tuple(sorted(path for path in store.folders() if os.path.isdir(path)))
    size = sum(each.st_size for each in found)
    return Contents(len(store.records()), len(found), size, shared, folders)


def verify(store: Store) -> Verified:
    """Read every blob; remove what is wrong, and what cannot be restored for want of it."""
    wrong: list[str] = []
    count = size = 0
    for digest, found in store.blobs():
        stamp = blob_stamps.stamp_of(found)
        count, size = count + 1, size + found.st_size
        if hash_file(store.blob(digest)) != digest:
            wrong.append(digest)
            store.discard(digest)
            continue
        if blob_stamps.noted(store.root, digest) is not None:
            blob_stamps.note(store.root, digest, stamp)
    lame = []
    for key in store.records():
        action = store.action(key)
        if action is None or not all(map(store.holds, action.files)):
            lame.append(key)
            store.forget(key)
    return Verified(count, size, tuple(wrong), tuple(lame))


def collect(
    store: Store,
    in_use: KeysInUse,
    keep: float | None,
    most: int | None,
    now: float | None = None,
) -> Removed:
    """Remove records that nobody has used for `keep` seconds, then the least recently used
    until the blobs take no more than `most` bytes; then the blobs that no record names.

    What a registered build folder uses stays, whatever that costs, and so does what was used
    within the last hour. Whatever `in_use` raises ends it before anything is removed.
    """
    now = time.time() if now is None else now
    used = _used(store, in_use)
    last = {key: store.last_used(key) for key in store.records()}
    ages = {key: now - at for key, at in last.items()}
    held = {key: action.files for key in ages if (action := store.action(key)) is not None}
    going = {
        key for key in held if keep is not None and ages[key] > max(keep, GRACE) and key not in used
    }
    if most is not None:
        free = (key for key in held if key not in used and ages[key] > GRACE)
        going |= _beyond(held, going, sorted(free, key=ages.__getitem__, reverse=True), most)
    gone = [key for key in going if store.forget_unused(key, last[key])]
    blobs, size = _sweep(store, _named(store), now)
    _tidy(store, now)
    kept = {e.digest: e.size for key in used & held.keys() for e in held[key]}
    return Removed(len(gone), blobs, size, sum(kept.values()))


def _used(store: Store, in_use: KeysInUse) -> set[str]:
    used: set[str] = set()
    for folder, registration in store.folders().items():
        if os.path.isdir(folder):
            used.update(in_use(folder))
        else:
            os.unlink(registration)
    return used


def _beyond(
    held: dict[str, tuple[Entry, ...]], going: set[str], oldest_first: list[str], most: int
) -> set[str]:
    """Which records must go, too, for the blobs of those that stay to fit."""
    references: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key, files in held.items():
        for digest, size in {entry.digest: entry.size for entry in files}.items():
            sizes[digest] = size
            references[digest] = references.get(digest, 0) + (key not in going)
    total = sum(size for digest, size in sizes.items() if references[digest])
    more = set()
    for key in oldest_first:
        if total <= most:
            break
        if key in going:
            continue
        more.add(key)
        for digest in {entry.digest for entry in held[key]}:
            references[digest] -= 1
            total -= 0 if references[digest] else sizes[digest]
    return more


def _named(store: Store) -> set[str]:
    """The digests of all blobs that a record names, those of builds that run now included."""
    actions = map(store.action, store.records())
    return {entry.digest for action in actions if action is not None for entry in action.files}


def _sweep(store: Store, named: Collection[str], now: float) -> tuple[int, int]:
    """Remove blobs that no record names and that are not new."""
    count = size = 0
    for digest, found in store.blobs():
        old = digest not in named and now - found.st_ctime > GRACE
        if old and store.discard_unused(digest, found):
            count, size = count + 1, size + found.st_size
    return count, size


def _tidy(store: Store, now: float) -> None:
    """Remove what killed processes left half written."""
    with os.scandir(f"{store.root}/tmp") as scan:
        for entry in scan:
            with contextlib.suppress(FileNotFoundError):
                if now - entry.stat().st_mtime > ABANDONED:
                    os.unlink(entry.path)
