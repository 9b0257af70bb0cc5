"""The local store: what it gives back is what was put in, whatever happened meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from buildsys.store import blob_stamps
from buildsys.store.actions import Action, Entry
from buildsys.store.local import LINKED, Put, Store
from tests.store.conftest import LARGE, key_of, put, restored

FILES = {
    "small": b"one",
    "dir/large": bytes(range(256)) * 8192,
    "dir/run!": b"#!/bin/sh\n",
    "e": b"",
}


def entry_of(content: bytes, path: str = "f") -> Entry:
    return Entry(path, blake3(content).hexdigest(), len(content), False)


def flip(path: str, *, quietly: bool = False) -> None:
    """Flip one bit in place; quietly: with the old time of modification."""
    before = os.stat(path)
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 4]))
    if quietly:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_come_back_with_bytes_modes_and_folders(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path / "a", "step", FILES)
    assert restored(store, tmp_path / "b", "step") == FILES
    assert os.access(tmp_path / "b/dir/run!", os.X_OK)
    assert not os.access(tmp_path / "b/small", os.X_OK)


def test_only_large_files_share_their_inode_and_are_read_only_then(
    store: Store, tmp_path: Path
) -> None:
    action = put(store, tmp_path / "a", "step", FILES)
    restored(store, tmp_path / "b", "step")
    for entry in action.files:
        blob, copy = os.stat(store.blob(entry.digest)), os.stat(tmp_path / "b" / entry.path)
        if store._reflinks:  # on Btrfs and XFS nothing is linked
            assert blob.st_ino != copy.st_ino
            continue
        assert (blob.st_ino == copy.st_ino) == (entry.size >= LINKED)
        if entry.size >= LINKED:
            assert copy.st_mode & 0o222 == 0
        assert blob.st_mode & 0o222 == 0


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("quietly", [False, True])
def test_flipped_bit_is_found_and_never_given_out(
    store: Store, tmp_path: Path, size: int, quietly: bool
) -> None:
    action = put(store, tmp_path / "a", "step", {"f": b"x" * size})
    flip(store.blob(action.files[0].digest), quietly=quietly)
    assert restored(store, tmp_path / "b", "step") is None
    assert not os.path.exists(store.blob(action.files[0].digest))
    assert store.action(key_of("step")) is None
    put(store, tmp_path / "c", "step", {"f": b"x" * size})
    assert restored(store, tmp_path / "d", "step") == {"f": b"x" * size}


@pytest.mark.parametrize("size", [10, LARGE])
def test_truncated_blob_is_a_miss(store: Store, tmp_path: Path, size: int) -> None:
    action = put(store, tmp_path / "a", "step", {"f": b"x" * size})
    os.truncate(store.blob(action.files[0].digest), size - 1)
    assert restored(store, tmp_path / "b", "step") is None


def test_linked_output_edited_in_place_does_not_spread(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path / "a", "step", {"f": b"x" * LARGE})
    flip(str(tmp_path / "a/f"), quietly=True)
    found = restored(store, tmp_path / "b", "step")
    assert found in (None, {"f": b"x" * LARGE})  # the latter where blocks are shared, not inodes


def test_blob_whose_links_changed_is_read_once_and_then_vouched_for(
    store: Store, tmp_path: Path
) -> None:
    action = put(store, tmp_path / "a", "step", {"f": b"x" * LARGE})
    (entry,) = action.files
    if store._reflinks:
        pytest.skip("this file system shares blocks, not inodes")
    os.unlink(tmp_path / "a/f")  # by `clean`, say: the ctime is another now
    stamp = blob_stamps.stamp_of(os.stat(store.blob(entry.digest)))
    assert not blob_stamps.vouches(store.root, entry.digest, stamp)
    assert store.sound(entry)
    assert blob_stamps.vouches(store.root, entry.digest, stamp)


def test_file_that_changed_since_its_commit_is_not_stored(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"other")
    action = Action((entry_of(b"bytes"),), (), {}, {})
    store.put([Put(key_of("step"), action, {"f": str(path)})])
    assert store.action(key_of("step")) is None
    assert list(store.blobs()) == []


def test_too_many_links_end_in_a_copy(store: Store, tmp_path: Path) -> None:
    content = b"x" * LARGE
    action = put(store, tmp_path / "a", "step", {"f": content})
    if store._reflinks:
        pytest.skip("this file system shares blocks, not inodes")
    blob = store.blob(action.files[0].digest)
    links = tmp_path / "links"
    links.mkdir()
    try:
        for number in range(70_000):
            os.link(blob, links / str(number))
    except OSError:
        assert os.stat(blob).st_nlink > 1000
    else:
        pytest.skip("this file system has no limit of links that a test could reach")
    assert restored(store, tmp_path / "b", "step") == {"f": content}
    assert os.stat(tmp_path / "b/f").st_nlink == 1


def _put_many(root: str, folder: str, number: int) -> None:
    store = Store(root)
    for round_ in range(20):
        files = {"same": b"s" * 100, "large": bytes([round_]) * LARGE, f"own{number}": b"o"}
        put(store, Path(folder) / f"{number}-{round_}", f"step{round_}", files)


def test_processes_that_put_the_same_blobs_at_once_agree(store: Store, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    processes = [
        spawn.Process(target=_put_many, args=(store.root, str(tmp_path), number))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for digest, _ in store.blobs():
        assert blake3(Path(store.blob(digest)).read_bytes()).hexdigest() == digest
    for round_ in range(20):
        found = restored(store, tmp_path / f"back{round_}", f"step{round_}")
        assert found is not None
        assert found["large"] == bytes([round_]) * LARGE
    assert os.listdir(f"{store.root}/tmp") == []


PUTTING = """
import sys
from pathlib import Path
from buildsys.store.local import Store
from tests.store.conftest import LARGE, put
store = Store(sys.argv[1])
print("go", flush=True)
for number in range(100000):
    files = {"small": b"%d" % number, "large": b"%07d" % number * 200000, "run!": b"#!%d" % number}
    put(store, Path(sys.argv[2]) / str(number), f"step{number}", files)
"""


def test_kill_at_any_moment_leaves_nothing_half_under_a_final_name(
    store: Store, tmp_path: Path
) -> None:
    for delay in (0.0, 0.003, 0.02, 0.05, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", PUTTING, store.root, str(tmp_path / f"a{delay}")],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for digest, _ in store.blobs():
            assert blake3(Path(store.blob(digest)).read_bytes()).hexdigest() == digest
        for number, key in enumerate(store.records()):
            action = store.action(key)
            assert action is not None
            assert store.restore(key, action, str(tmp_path / f"b{delay}-{number}"))


def test_full_disk_leaves_the_store_as_it_was(store: Store, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail half way, as they do there."""
    put(store, tmp_path / "a", "before", {"f": b"1" * 5000})
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = tmp_path / "big"
        path.write_bytes(b"2" * 500_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            put_existing(store, path)
        except OSError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert os.listdir(f"{store.root}/tmp") == []
    assert len(list(store.blobs())) == 1
    assert store.records() == [key_of("before")]


def put_existing(store: Store, path: Path) -> None:
    entry = entry_of(path.read_bytes())
    store.put([Put(key_of("big"), Action((entry,), (), {}, {}), {"f": str(path)})])


def test_damaged_record_is_a_miss(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path / "a", "step", {"f": b"1"})
    path = f"{store.root}/ac/{key_of('step')}"
    flip(path)
    assert store.action(key_of("step")) is None
    assert not os.path.exists(path)
