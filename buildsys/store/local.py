"""The store on this machine: blobs by digest, action records by key, any number of users at once.

    cas/b3/xx/DIGEST  a file's bytes; read-only
    ac/KEY            an action record; written after the blobs that it names
    stamps/xx/DIGEST  see `blob_stamps`; for blobs that may share their inode with artifacts
    roots/NAME        the path of a build folder that uses the store
    tmp/              what is being written
    lock              see `guard`

A reader believes nothing: what it copies it digests, what it links has the stamp that the store
left it with or is digested. So a blob that is gone, cut short or changed is a miss, not an error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3

from buildsys.identity import hash_file
from buildsys.store import blob_stamps
from buildsys.store.actions import Action, BadRecord, Entry, decode, encode, seal, unseal
from buildsys.store.blob_stamps import stamp_of
from buildsys.store.guard import claiming, removing
from buildsys.store.placing import copy, flush, hard_link, reflink, write_all

LINKED = 1 << 20  # bytes: below, a copy costs less than to look after a link
READ_ONLY = 0o444
SPARE = 0.05  # of a disk: what copying into the store leaves free


class Put(NamedTuple):
    """An action to be stored. places: path of an entry -> the file that has its bytes."""

    key: str
    action: Action
    places: Mapping[str, str]


class Store:
    """Invariant: what is under a final name was complete, right and on the disk when it got
    there. Methods may be called by several threads and processes at once."""

    def __init__(self, root: str) -> None:
        """Open it, or make it. Raises OSError."""
        self.root = root
        for name in ("cas/b3", "ac", "stamps", "roots", "tmp"):
            os.makedirs(f"{root}/{name}", mode=0o700, exist_ok=True)
        self._own = os.urandom(6).hex()  # a killed process of the same number left its names
        self._count = itertools.count()
        self._reflinks = True  # until the file system says no

    def blob(self, digest: str) -> str:
        """Where the blob of a digest is, or would be."""
        return f"{self.root}/cas/b3/{digest[:2]}/{digest}"

    def holds(self, entry: Entry) -> bool:
        """Is there a blob of that digest and size? Its bytes are not looked at."""
        try:
            return os.stat(self.blob(entry.digest)).st_size == entry.size
        except FileNotFoundError:
            return False

    def temporary(self) -> str:
        """A new name in the store's own folder."""
        return f"{self.root}/tmp/{self._own}-{next(self._count)}"

    def used_by(self, folder: str) -> None:
        """Register a build folder: what it uses is not garbage."""
        name = f"{self.root}/roots/{blake3(os.fsencode(folder)).hexdigest(16)}"
        if not os.path.exists(name):
            self._write(name, os.fsencode(folder))

    # Reading

    def action(self, key: str) -> Action | None:
        """The record under a key; None where there is none that can be read."""
        path = self._record(key)
        try:
            with open(path, "rb") as file:
                return decode(key, unseal(file.read()))[0]
        except FileNotFoundError:
            return None
        except BadRecord:
            self.forget(key)
            return None

    def restore(self, key: str, action: Action, folder: str) -> bool:
        """Put an action's files below a folder. False where a blob is gone or not what it
        should be; the folder then holds a part, and the record is forgotten."""
        try:
            with claiming(self.root):
                os.utime(self._record(key))  # used now, for `gc`
        except FileNotFoundError:
            return False  # it has just gone, and its blobs may go
        for path in action.folders:
            os.makedirs(f"{folder}/{path}", exist_ok=True)
        for entry in action.files:
            target = f"{folder}/{entry.path}"
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not self._take(entry, target):
                self.forget(key)
                return False
        return True

    def sound(self, entry: Entry) -> bool:
        """Has the blob its bytes? Read only where it is in doubt; a wrong one is removed."""
        blob = self.blob(entry.digest)
        try:
            stamp = stamp_of(os.stat(blob))
            if blob_stamps.noted(self.root, entry.digest) == stamp:
                return True
            if hash_file(blob) == entry.digest:
                if _may_share(entry):
                    blob_stamps.note(self.root, entry.digest, stamp)
                return True
        except FileNotFoundError:
            return False
        self.discard(entry.digest)
        return False

    def _take(self, entry: Entry, target: str) -> bool:
        blob = self.blob(entry.digest)
        try:
            if _may_share(entry):
                if not self.sound(entry):
                    return False
                if self._share(blob, target, entry.digest):
                    return True
            digest = copy(blob, target, 0o777 if entry.executable else 0o666)
        except FileNotFoundError:
            return False
        if digest != entry.digest:
            self.discard(entry.digest)
        return digest == entry.digest

    def _share(self, blob: str, target: str, digest: str) -> bool:
        if self._reflinks:
            self._reflinks = reflink(blob, target, 0o666)
            if self._reflinks:
                return True
        if not hard_link(blob, target):
            return False
        blob_stamps.note(self.root, digest, stamp_of(os.stat(target)))
        return True

    # Writing

    def link_in(self, path: str, entry: Entry) -> bool:
        """Take a large file in without copying it, if that can be. `path` has the bytes that
        `entry` says, now; a file that shares its inode with the blob is read-only afterwards."""
        if not _may_share(entry):
            return False
        blob = self.blob(entry.digest)
        try:
            if os.path.samefile(blob, path):  # restored, and renamed since
                blob_stamps.note(self.root, entry.digest, stamp_of(os.stat(path)))
                return True
        except FileNotFoundError:
            os.makedirs(os.path.dirname(blob), exist_ok=True)
        if self.sound(entry) and self.claim(entry):
            return True
        return self._reflink_in(path, blob, entry) or self._hard_link_in(path, blob, entry)

    def _reflink_in(self, path: str, blob: str, entry: Entry) -> bool:
        temporary = self.temporary()
        if not self._reflinks:
            return False
        self._reflinks = reflink(path, temporary, READ_ONLY)
        if self._reflinks:
            self.adopt(temporary, entry)
        return self._reflinks

    def _hard_link_in(self, path: str, blob: str, entry: Entry) -> bool:
        if os.stat(path).st_nlink > 1:  # somebody else may write to it
            return False
        try:
            if not hard_link(path, blob):
                return False
        except FileExistsError:
            return True  # just put by another process
        os.chmod(path, os.stat(path).st_mode & READ_ONLY)
        blob_stamps.note(self.root, entry.digest, stamp_of(os.stat(path)))
        return True

    def put(self, puts: Sequence[Put]) -> None:
        """Store actions: all blobs, then, with one wait for the disk, all records.

        An action is left out whose files are no longer what it says. Raises OSError where the
        disk is full; nothing is half stored then.
        """
        staged: dict[str, tuple[str, Entry]] = {}
        records: list[tuple[str, str]] = []
        try:
            for each in puts:
                stage = (self._stage(each.places[e.path], e, staged) for e in _files(each))
                if all(stage):
                    temporary = self.temporary()
                    records.append((temporary, self._record(each.key)))
                    _write_new(temporary, seal(encode(each.key, each.action)))
            flush([name for name, _ in (*staged.values(), *records)], self.root)
            for temporary, entry in staged.values():
                self._place(temporary, entry)
            for temporary, record in records:
                os.replace(temporary, record)
        finally:
            for temporary, _ in (*staged.values(), *records):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

    def _stage(self, path: str, entry: Entry, staged: dict[str, tuple[str, Entry]]) -> bool:
        if entry.digest in staged or (self.holds(entry) and self.claim(entry)):
            return True
        if not has_room(self.root, entry.size):
            return False
        temporary = self.temporary()
        try:
            digest = copy(path, temporary, READ_ONLY)
        except FileNotFoundError:
            return False
        except OSError:
            os.unlink(temporary)
            raise
        if digest != entry.digest:  # changed since it was committed
            os.unlink(temporary)
            return False
        staged[entry.digest] = (temporary, entry)
        return True

    def claim(self, entry: Entry) -> bool:
        """A blob that is here already is about to be named by a new record: for `gc` it is new.
        False where it has just gone."""
        blob = self.blob(entry.digest)
        with claiming(self.root):
            try:
                found = os.stat(blob)
                vouched = blob_stamps.noted(self.root, entry.digest) == stamp_of(found)
                os.chmod(blob, found.st_mode & READ_ONLY)  # changes its ctime, and no more
                if vouched:
                    blob_stamps.note(self.root, entry.digest, stamp_of(os.stat(blob)))
            except FileNotFoundError:
                return False
        return True

    def record(self, key: str, action: Action) -> None:
        """Write a record whose blobs are all here. Raises OSError."""
        self._write(self._record(key), seal(encode(key, action)))

    def adopt(self, temporary: str, entry: Entry) -> None:
        """Make a file in `tmp`, whose bytes are right, the blob."""
        flush([temporary], self.root)
        os.chmod(temporary, READ_ONLY)
        self._place(temporary, entry)

    def _place(self, temporary: str, entry: Entry) -> None:
        blob = self.blob(entry.digest)
        os.makedirs(os.path.dirname(blob), exist_ok=True)
        os.replace(temporary, blob)
        if _may_share(entry):
            blob_stamps.note(self.root, entry.digest, stamp_of(os.stat(blob)))

    def _write(self, path: str, data: bytes) -> None:
        temporary = self.temporary()
        try:
            _write_new(temporary, data)
            flush([temporary], self.root)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    # Removing

    def forget_unused(self, key: str, last: float) -> bool:
        """Remove a record, unless somebody has used it since."""
        with removing(self.root):
            if self.last_used(key) != last:
                return False
            self.forget(key)
        return True

    def discard_unused(self, digest: str, found: os.stat_result) -> bool:
        """Remove a blob, unless somebody has taken it since stat said this of it."""
        with removing(self.root):
            try:
                if stamp_of(os.stat(self.blob(digest))) != stamp_of(found):
                    return False
            except FileNotFoundError:
                return False
            self.discard(digest)
        return True

    def forget(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._record(key))

    def discard(self, digest: str) -> None:
        blob_stamps.forget(self.root, digest)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.blob(digest))

    # Looking around

    def records(self) -> list[str]:
        """Their keys."""
        return os.listdir(f"{self.root}/ac")

    def last_used(self, key: str) -> float:
        """Seconds since the epoch; 0 where the record is gone."""
        return _mtime(self._record(key))

    def blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every blob's digest, and what stat says."""
        for folder in sorted(os.listdir(f"{self.root}/cas/b3")):
            with os.scandir(f"{self.root}/cas/b3/{folder}") as scan:
                for entry in scan:
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat()

    def folders(self) -> dict[str, str]:
        """Registered build folders: path -> the file that says so."""
        found = {}
        with os.scandir(f"{self.root}/roots") as scan:
            for entry in scan:
                with open(entry.path, "rb") as file:
                    found[os.fsdecode(file.read())] = entry.path
        return found

    def _record(self, key: str) -> str:
        return f"{self.root}/ac/{key}"


def has_room(folder: str, size: int) -> bool:
    """Would copying so much leave a twentieth of the disk free?"""
    found = os.statvfs(folder)
    return (found.f_bavail * found.f_frsize) - size >= SPARE * found.f_blocks * found.f_frsize


def _may_share(entry: Entry) -> bool:
    """Executables are copied: their mode must differ, and one that runs cannot be written."""
    return entry.size >= LINKED and not entry.executable


def _files(put: Put) -> Iterator[Entry]:
    seen = set()
    for entry in put.action.files:
        if entry.digest not in seen:
            seen.add(entry.digest)
            yield entry


def _write_new(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def _mtime(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
