"""One builder at a time, and no lock outlives those that could still write."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from buildsys.engine.lock import BuildLock, describe_owner
from buildsys.errors import QbuildError
from tests.engine.shop import Shop

HOLD = """
import os, sys
from buildsys.engine.lock import BuildLock
lock = BuildLock(sys.argv[1], print)
lock.acquire()
{then}
"""
WAIT = "print('held', flush=True); sys.stdin.read()"
# What the executor's supervisor does: inherit the descriptor, and outlive its parent.
ORPHAN = """
import subprocess
code = "import sys; sys.stdin.read()"
orphan = subprocess.Popen([sys.executable, "-c", code], pass_fds=[lock.fd], stdin=0)
print(orphan.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def holder(path: Path, then: str) -> subprocess.Popen[str]:
    code = HOLD.format(then=then)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, path], stdin=pipe, stdout=pipe, text=True)


def word_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_second_builder_waits_and_says_for_whom(tmp_path: Path) -> None:
    first = holder(tmp_path / "lock", WAIT)
    assert word_of(first) == "held"
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    second = BuildLock(str(tmp_path / "lock"), say)
    thread = threading.Thread(target=second.acquire)
    thread.start()
    assert told.wait(10)
    assert f"process {first.pid} on {os.uname().nodename}, since " in said[0]
    assert thread.is_alive()
    first.communicate("")
    thread.join(10)
    assert not thread.is_alive()
    second.release()


def test_killed_builder_leaves_no_lock(tmp_path: Path) -> None:
    first = holder(tmp_path / "lock", WAIT)
    assert word_of(first) == "held"
    first.kill()
    first.communicate()
    second = BuildLock(str(tmp_path / "lock"), lambda text: None)
    second.acquire()
    second.release()


def test_lock_is_held_until_the_last_descendant_of_a_killed_builder_is_gone(
    tmp_path: Path,
) -> None:
    first = holder(tmp_path / "lock", ORPHAN)
    orphan = int(word_of(first))
    first.wait()
    assert first.returncode == -signal.SIGKILL
    said: list[str] = []
    told = threading.Event()
    second = BuildLock(str(tmp_path / "lock"), lambda text: (said.append(text), told.set())[0])
    thread = threading.Thread(target=second.acquire)
    thread.start()
    assert told.wait(10)
    assert "that was killed" in said[0]
    os.kill(orphan, signal.SIGKILL)
    thread.join(10)
    assert not thread.is_alive()
    second.release()
    first.communicate()


def test_lock_file_that_was_replaced_meanwhile_is_not_held_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = BuildLock(str(path), lambda text: None)
    first.acquire()
    told = threading.Event()
    second = BuildLock(str(path), lambda text: told.set())
    thread = threading.Thread(target=second.acquire)
    thread.start()
    assert told.wait(10)
    path.unlink()
    first.release()
    thread.join(10)
    assert os.path.samestat(os.fstat(second.fd), path.stat())
    second.release()


@pytest.fixture
def read_only(chain: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A built folder on a disk that takes no more files. (Tests may run as root, whom modes of
    files do not stop.)"""

    def refuse(self: BuildLock) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    chain.build()
    monkeypatch.setattr(BuildLock, "acquire", refuse)
    return chain


def test_build_folder_on_a_read_only_disk_still_says_that_nothing_is_to_be_done(
    read_only: Shop,
) -> None:
    assert read_only.build().outcome is None


def test_build_folder_on_a_read_only_disk_says_what_it_cannot_do(read_only: Shop) -> None:
    read_only.edit("b", text="X")
    with pytest.raises(QbuildError, match="is read-only, and 2 steps must run"):
        read_only.build()


def test_owner_that_has_not_signed_yet(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    assert "just started" in describe_owner(str(tmp_path / "lock"))
