"""The cache that machines share: the same blobs and records, behind a URL.

    ac/KEY                 a sealed record; written last
    cas/b3/xx/DIGEST       a blob as it is
    cas/b3/xx/DIGEST.zst   a blob that was worth packing; the record says which

With a key (`signing`) only records sealed with it are believed, and what is made here is
shared. Without one the other side is taken at its word, and nothing is written to it. Blobs
are digested as they arrive either way. It is a convenience: what does not answer, or refuses,
is reported once and left alone for the rest of the run.
"""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from buildsys.store.actions import Action, BadRecord, Entry, decode, encode
from buildsys.store.packing import TooLong, Verifier, pack, pays
from buildsys.store.placing import write_all
from buildsys.store.signing import sign, verified
from buildsys.store.transport import open_transport

if TYPE_CHECKING:
    from buildsys.store.local import Store
    from buildsys.store.transport import Transport

LONGEST_RECORD = 64 << 20


class StoreTrouble(Exception):
    """The local store cannot take what arrives."""


class Remote:
    """Never raises but StoreTrouble; used by several threads. warn: a line for the person.

    reads, writes: is it still used for that; answered: has it ever?
    """

    def __init__(
        self,
        url: str,
        key: bytes | None,
        store: Store,
        warn: Callable[[str], None],
        transport: Callable[[str], Transport] = open_transport,
    ) -> None:
        self.name = without_password(url)
        self.reads = True
        self.answered = False
        self.writes = key is not None
        self._url = url
        self._key = key
        self._store = store
        self._warn = warn
        self._open = transport
        self._transport: Transport | None = None
        self._lock = threading.Lock()
        self._refused: set[str] = set()

    def fetch(self, key: str, heard: Callable[[], None] = lambda: None) -> Action | None:
        """The action under a key, all its blobs and its record then in the local store; None
        where there is none, or none that can be trusted. heard: called when something arrives.

        Raises StoreTrouble.
        """
        if not self.reads:
            return None
        try:
            return self._fetch(key, heard)
        except StoreTrouble:
            raise
        except Exception as error:  # drivers raise what they like; all of it means the same
            self.give_up(_reason(error))
            return None

    def share(self, key: str, action: Action, *, anew: bool) -> bool:
        """Upload an action that the local store holds. anew: it was made here, so whatever is
        there is replaced. False where that failed."""
        if not self.writes:
            return False
        try:
            return self._share(key, action, anew)
        except Exception as error:  # as above; and reading may go on
            with self._lock:
                first, self.writes = self.writes, False
            if first and self.reads:
                self._warn(f"{self.name} takes nothing ({_reason(error)}): nothing is shared")
            return False

    def give_up(self, reason: str) -> None:
        """Leave it alone from here on; said once."""
        with self._lock:
            first, self.reads, self.writes = self.reads, False, False
        if first:
            self._warn(f"the cache {self.name} cannot be used ({reason}): building without it")

    def _fetch(self, key: str, heard: Callable[[], None]) -> Action | None:
        data = bytearray()

        def take(piece: bytes) -> None:
            heard()
            data.extend(piece)
            if len(data) > LONGEST_RECORD:
                raise TooLong("a record without end")

        there = self._there()
        heard()
        try:
            found = there.read(f"ac/{key}", take)
            self.answered = True
            heard()
            if not found:
                return None
            action, packed = self._believed(key, bytes(data))
            for entry in action.files:
                if not (self._store.holds(entry) and self._store.claim(entry)):
                    self._fetch_blob(entry, entry.digest in packed, heard)
        except (BadRecord, TooLong) as error:
            self._refused.add(key)
            self._warn(f"{self.name}: {error}; not used")
            return None
        with _local():
            self._store.record(key, action)
        return action

    def _believed(self, key: str, data: bytes) -> tuple[Action, frozenset[str]]:
        """The action of a record, and which of its blobs are packed. Raises BadRecord."""
        body = verified(self._key, data)
        if body is None:
            raise BadRecord(f"the record {key[:12]}... is not sealed with your key")
        action, content = decode(key, body)
        return action, frozenset(content.get("packed", ()))

    def _fetch_blob(self, entry: Entry, packed: bool, heard: Callable[[], None]) -> None:
        """Raises BadRecord for a blob that is missing or wrong."""
        from zstandard import ZstdError

        with self._scratch() as temporary:
            with _local():
                file = open(temporary, "xb", buffering=0)  # noqa: SIM115  (closed by the next line)
            with file:
                arriving = Verifier(_guarded_write(file.fileno()), entry.size, packed=packed)

                def take(piece: bytes) -> None:
                    heard()
                    arriving.write(piece)

                try:
                    there = self._there().read(blob_name(entry.digest, packed), take)
                except (TooLong, ZstdError):
                    there = True
            if not there or not arriving.is_right(entry.digest):
                self._refused.add(entry.digest)
                what = "not what its record says" if there else "not there"
                raise BadRecord(f"the blob of {entry.path} ({entry.digest[:12]}...) is {what}")
            with _local():
                self._store.adopt(temporary, entry)

    def _share(self, key: str, action: Action, anew: bool) -> bool:
        there = self._there()
        if not anew and key not in self._refused and there.exists(f"ac/{key}"):
            return True
        packed = []
        for entry in dict.fromkeys(action.files):
            if not self._store.sound(entry):
                return False
            blob = self._store.blob(entry.digest)
            worth = pays(blob)
            if worth:
                packed.append(entry.digest)
            name = blob_name(entry.digest, worth)
            # Behind a record that was wrong nobody has looked at the blobs.
            wrong = entry.digest in self._refused or key in self._refused
            if wrong or not there.exists(name):
                self._upload(blob, name, worth)
        with self._scratch() as temporary:
            with open(temporary, "xb") as file:
                assert self._key is not None  # or it would not be writable
                file.write(sign(self._key, encode(key, action, packed=packed)))
            there.upload(temporary, f"ac/{key}")
        return True

    def _upload(self, blob: str, name: str, worth: bool) -> None:
        if not worth:
            self._there().upload(blob, name)
            return
        with self._scratch() as temporary:
            pack(blob, temporary)
            self._there().upload(temporary, name)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[str]:
        temporary = self._store.temporary()
        try:
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _there(self) -> Transport:
        with self._lock:
            if self._transport is None:
                self._transport = self._open(self._url)
            return self._transport


def blob_name(digest: str, packed: bool) -> str:
    return f"cas/b3/{digest[:2]}/{digest}" + (".zst" if packed else "")


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    found = urllib.parse.urlsplit(url)
    if "@" not in found.netloc:
        return url
    return found._replace(netloc=found.netloc.rpartition("@")[2]).geturl()


@contextlib.contextmanager
def _local() -> Iterator[None]:
    """A failure here is not the other side's."""
    try:
        yield
    except OSError as error:
        raise StoreTrouble(error.strerror or str(error)) from error


def _guarded_write(fd: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        with _local():
            write_all(fd, data)

    return write


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text or type(error).__name__
