"""Files arrive whole or not at all, and only those that differ are sent."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from buildsys.devices.definitions import transport_of
from buildsys.devices.device_lock import DeviceLock
from buildsys.devices.errors import DeviceError, DeviceRefused
from buildsys.devices.remote_folder import RemoteFolder
from tests.devices.targets import Target, forge_times, noise

MIB = 1 << 20


def test_files_arrive_whole_with_their_modes(target: Target) -> None:
    model, tool = noise(3 * MIB + 17), b"#!/bin/sh\nexit 0\n"
    code = target.deploy(
        target.file("models/a.mllm", model), target.file("tool", tool, 0o755), target.file("e", b"")
    )
    assert code == 0
    assert target.content() == {"models/a.mllm": model, "tool": tool, "e": b""}
    assert stat.S_IMODE((target.here / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((target.here / "models/a.mllm").stat().st_mode) == 0o644
    assert target.parts() == []


def test_unchanged_files_are_not_sent(target: Target) -> None:
    files = [target.file(f"f{number}", noise(1000, number)) for number in range(3)]
    target.deploy(*files)
    before = [(target.here / file.target).stat() for file in files]
    target.deploy(*files)
    assert target.notes.of("sending") == []
    assert [(target.here / file.target).stat() for file in files] == before


def test_a_change_of_same_size_and_time_is_sent(target: Target) -> None:
    first = target.file("model", b"A" * 5000)
    target.deploy(first)
    before = Path(first.path).stat()
    second = target.file("model", b"B" * 5000)
    os.utime(second.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.deploy(target.file("model", b"B" * 5000))
    assert target.content() == {"model": b"B" * 5000}


def test_a_file_edited_on_the_device_is_put_right(target: Target) -> None:
    good = noise(4096)
    target.deploy(target.file("model", good), target.file("other", b"x"))
    there = target.here / "model"
    before = there.stat()
    there.write_bytes(noise(4096, 1))
    forge_times(there, before)
    target.deploy(target.file("model", good), target.file("other", b"x"))
    assert target.content()["model"] == good
    assert [facts["file"] for facts in target.notes.of("sending")] == ["model"]


def test_a_file_deleted_on_the_device_is_sent_again(target: Target) -> None:
    target.deploy(target.file("model", b"1"), target.file("other", b"2"))
    (target.here / "model").unlink()
    target.deploy(target.file("model", b"1"), target.file("other", b"2"))
    assert target.content() == {"model": b"1", "other": b"2"}
    assert target.notes.sent == 1


def test_a_touched_file_is_compared_there_and_not_sent(target: Target) -> None:
    target.deploy(target.file("model", noise(1000)))
    os.utime(target.here / "model", ns=(1, 1))
    target.deploy(target.file("model", noise(1000)))
    assert target.notes.of("sending") == []


@pytest.mark.parametrize("damage", ["", "{", '{"version": 1, "files": {"model": 3}}', "[]", "\0"])
def test_a_damaged_manifest_is_not_believed(local: Target, damage: str) -> None:
    local.deploy(local.file("model", b"new"))
    (local.here / "model").write_bytes(b"old")
    (local.here / ".qb/manifest.json").write_text(damage)
    assert local.deploy(local.file("model", b"new")) == 0
    assert local.content() == {"model": b"new"}
    assert json.loads((local.here / ".qb/manifest.json").read_text())["files"].keys() == {"model"}


def test_a_manifest_of_the_future_is_refused(local: Target) -> None:
    local.deploy(local.file("model", b"old"))
    (local.here / ".qb/manifest.json").write_text('{"version": 99, "files": {}}')
    with pytest.raises(DeviceRefused, match="newer qbuild"):
        local.deploy(local.file("model", b"new"))
    assert local.content() == {"model": b"old"}


def test_verify_finds_what_the_manifest_does_not_know(target: Target) -> None:
    """A disk that loses bits changes no time: only digests tell."""
    good = noise(2000)
    target.deploy(target.file("model", good))
    there = target.here / "model"
    there.write_bytes(noise(2000, 1))
    stale = target.file("model", noise(2000, 1))
    target.deploy(stale)  # now the manifest vouches for the damaged bytes
    manifest = target.here / ".qb/manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["model"]["sha256"] = target.file("model", good).facts.sha256
    manifest.write_text(json.dumps(content))
    good_file = target.file("model", good)
    target.deploy(good_file)
    assert target.content()["model"] != good
    target.deploy(good_file, verify=True)
    assert target.content()["model"] == good


def test_one_content_under_two_names(target: Target) -> None:
    files = [target.file(name, b"same") for name in ("lib_CPU.so", "q/lib_HTP.so", "c")]
    target.deploy(*files)
    assert target.content() == {"lib_CPU.so": b"same", "q/lib_HTP.so": b"same", "c": b"same"}
    assert target.notes.sent == 4


def test_a_part_of_other_bytes_is_not_believed(target: Target) -> None:
    """Whatever lies under a part's name, the digest decides."""
    good = noise(MIB)
    file = target.file("model", good)
    target.deploy(target.file("first", b""))
    for damaged in (noise(1000, 9), noise(MIB, 9), noise(2 * MIB, 9)):
        (target.here / "model").unlink(missing_ok=True)
        part = target.here / f".qb/{file.facts.sha256}.part"
        part.write_bytes(damaged)
        assert target.deploy(target.file("first", b""), file) == 0
        assert target.content()["model"] == good
        assert target.parts() == []


def test_a_source_that_changes_while_it_is_sent_never_arrives(local: Target) -> None:
    local.deploy(local.file("model", b"old one"))
    file = local.file("model", b"A" * 1000)
    with open(file.path, "wb") as other:  # noqa: PTH123 (as any program would)
        other.write(b"B" * 1000)
    with pytest.raises(DeviceError, match="arrives changed"):
        local.deploy(file)
    assert local.content() == {"model": b"old one"}


def test_prune_removes_only_what_qbuild_placed(target: Target) -> None:
    target.deploy(target.file("keep", b"1"), target.file("gone", b"2"), target.file("mine", b"3"))
    (target.here / "mine").write_bytes(b"edited by hand")
    (target.here / "foreign").write_bytes(b"somebody's")
    leftover = target.here / f".qb/{'0' * 64}.part"
    leftover.write_bytes(b"half")
    target.deploy(target.file("keep", b"1"))
    assert set(target.content()) == {"keep", "gone", "mine", "foreign"}
    target.deploy(target.file("keep", b"1"), prune=True)
    assert set(target.content()) == {"keep", "mine", "foreign"}
    assert not leftover.exists()


def test_dry_run_writes_nothing(target: Target) -> None:
    assert target.deploy(target.file("model", b"1"), dry_run=True) == 0
    assert not target.here.exists()
    assert target.notes.of("would-send") == [{"file": "model", "size": 1}]
    target.deploy(target.file("model", b"1"))
    before = changes(target.here)
    target.deploy(target.file("model", b"2"), dry_run=True)
    assert changes(target.here) == before


def changes(folder: Path) -> dict[Path, int]:
    """When each file and folder was last changed in any way; reading does not count."""
    return {path: path.stat().st_ctime_ns for path in folder.rglob("*")}


def test_links_and_folders_in_the_way_are_refused(target: Target) -> None:
    """A name on the device may not lead elsewhere, and a rename may not land inside a folder."""
    target.here.mkdir(parents=True)
    target.here.chmod(0o777)
    elsewhere = target.store / "elsewhere"
    elsewhere.mkdir()
    (target.here / "models").symlink_to(elsewhere)
    (target.here / "tool").mkdir()
    with pytest.raises(DeviceRefused, match=r"models is a link.*\n.*tool is a folder"):
        target.deploy(target.file("models/a", b"1"), target.file("tool", b"2"))
    assert list(elsewhere.iterdir()) == []
    assert list((target.here / "tool").iterdir()) == []


def test_old_files_go_first_only_when_asked(local: Target) -> None:
    local.deploy(local.file("a", b"old a"), local.file("b", b"b"))
    seen = []

    def look(kind: str) -> None:
        if kind == "sending":
            seen.append(sorted(local.content()))

    local.deploy(local.file("a", b"new a"), local.file("b", b"b"), on=look, replace_in_place=True)
    local.deploy(local.file("a", b"newer"), local.file("b", b"b"), on=look)
    assert seen == [["b"], ["a", "b"]]
    assert local.content() == {"a": b"newer", "b": b"b"}


def test_two_deploys_at_once_take_turns(target: Target) -> None:
    """The second waits, says for whom, and then finds everything in place."""
    transport = transport_of(target.device)
    transport.connect()
    folder = RemoteFolder(transport, target.device.root)
    waiting = threading.Event()
    codes = []

    def second() -> None:
        def heard(kind: str) -> None:
            if kind == "waiting":
                waiting.set()

        codes.append(target.deploy(target.file("model", b"1"), on=heard))

    with DeviceLock(folder, lambda text: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert target.content() == {}
    thread.join()
    transport.close()
    assert codes == [0]
    assert target.content() == {"model": b"1"}
    assert f", {os.getpid()}, since" in next(text for text in target.notes.texts if "wait" in text)
