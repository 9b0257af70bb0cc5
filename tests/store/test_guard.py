"""gc and builds at the same blob in the same instant: there is none in which it gets lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buildsys.store.garbage import collect
from buildsys.store.guard import claiming
from buildsys.store.local import Store
from tests.store.conftest import LARGE, key_of, put, restored

SMALL = b"1" * 1000
OLD = b"x" * LARGE
LATER = 4e9


def nobody(folder: str) -> tuple[str, ...]:
    return ()


def unnamed(store: Store, folder: Path, content: bytes) -> str:
    """The path of a blob that no record names, and that was not made in this tick of the clock."""
    action = put(store, folder, "old", {"f": content})
    store.forget(key_of("old"))
    blob, probe = store.blob(action.files[0].digest), folder / "probe"
    probe.touch()
    while probe.stat().st_ctime_ns <= os.stat(blob).st_ctime_ns:
        probe.touch()
    return blob


@pytest.mark.parametrize("content", [SMALL, OLD])
def test_blob_that_is_taken_after_gc_has_looked_at_it_stays(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    blob = unnamed(store, tmp_path / "old", content)
    twin, look = Store(store.root), store.blobs

    def and_then() -> Iterator[tuple[str, os.stat_result]]:
        for digest, found in look():
            put(twin, tmp_path / "new", "new", {"g": content})
            yield digest, found

    monkeypatch.setattr(store, "blobs", and_then)
    collect(store, nobody, None, None, LATER)
    assert Path(blob).exists()
    assert restored(store, tmp_path / "again", "new") == {"g": content}
    monkeypatch.undo()
    store.forget(key_of("new"))
    assert collect(store, nobody, None, None, LATER).blobs == 1
    assert not Path(blob).exists()


def test_record_that_is_used_after_gc_has_looked_at_it_stays(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, tmp_path / "old", "old", {"f": SMALL})
    os.utime(f"{store.root}/ac/{key_of('old')}", (0, 0))
    twin, forget = Store(store.root), store.forget_unused

    def and_before(key: str, last: float) -> bool:
        assert restored(twin, tmp_path / "restored", "old") is not None
        return forget(key, last)

    monkeypatch.setattr(store, "forget_unused", and_before)
    assert collect(store, nobody, 0.0, None).records == 0
    assert restored(store, tmp_path / "again", "old") == {"f": SMALL}


def test_record_that_is_gone_when_its_turn_comes_is_a_miss(tmp_path: Path, store: Store) -> None:
    action = put(store, tmp_path / "old", "old", {"f": SMALL})
    store.forget(key_of("old"))
    assert not store.restore(key_of("old"), action, str(tmp_path / "restored"))


def waits_for_lock(store: Store) -> bool:
    """Does somebody wait for the store's lock?"""
    inode = os.stat(f"{store.root}/lock").st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f":{inode} " in line for line in lines)


def waited(holds: Callable[[], bool], thread: threading.Thread) -> None:
    while not holds():
        assert thread.is_alive(), "it did not wait"
        os.sched_yield()


def test_gc_does_not_remove_anything_while_somebody_claims(tmp_path: Path, store: Store) -> None:
    blob = unnamed(store, tmp_path / "old", SMALL)
    thread = threading.Thread(target=collect, args=(store, nobody, None, None, LATER))
    with claiming(store.root):
        thread.start()
        waited(lambda: waits_for_lock(store), thread)
        assert Path(blob).exists()
    thread.join()
    assert not Path(blob).exists()


def test_where_there_are_no_locks_both_go_on(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr("buildsys.store.guard.fcntl.flock", no_locks)
    put(store, tmp_path / "a", "a", {"f": SMALL})
    assert restored(store, tmp_path / "b", "a") == {"f": SMALL}
    assert collect(store, nobody, 0.0, None, LATER).records == 1
