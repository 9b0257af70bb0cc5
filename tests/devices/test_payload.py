"""What `push` means as files, and which names and roots are taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from buildsys.devices.definitions import Push
from buildsys.devices.errors import DeviceRefused
from buildsys.devices.host_files import HostFiles
from buildsys.devices.names import checked_path, checked_root
from buildsys.devices.payload import Item, PushFile, files_of


def files(tmp_path: Path, *pushed: tuple[Path, str]) -> dict[str, PushFile]:
    known = HostFiles(str(tmp_path / "memory"))
    things = (
        Item(path.name, str(path), to, Push(path.name, to, None, None)) for path, to in pushed
    )
    return {file.target: file for file in files_of(things, known)}


def test_a_folder_goes_with_everything_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "mxq"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.mxq").write_bytes(b"1")
    (folder / "deep/b.json").write_bytes(b"2")
    assert set(files(tmp_path, (folder, "models/qwen/"))) == {
        "models/qwen/a.mxq", "models/qwen/deep/b.json"
    }  # fmt: skip
    assert set(files(tmp_path, (folder, "."))) == {"a.mxq", "deep/b.json"}


def test_programs_are_executable_there(tmp_path: Path) -> None:
    script, data, program = tmp_path / "run.sh", tmp_path / "data", tmp_path / "tool"
    script.write_text("#!/bin/sh\n")
    data.write_bytes(b"x")
    program.write_bytes(Path("/bin/sh").read_bytes())
    pushed = files(tmp_path, (script, "."), (data, "."), (program, "bin/"))
    assert {target: file.mode for target, file in pushed.items()} == {
        "run.sh": 0o755, "data": 0o644, "bin/tool": 0o755
    }  # fmt: skip


def test_links_and_devices_in_a_folder_are_refused(tmp_path: Path) -> None:
    """adb push would carry a link to /etc/passwd over as that very link."""
    for name, make in (
        ("link", lambda path: path.symlink_to("/etc/passwd")),
        ("pipe", os.mkfifo),
    ):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "a")
        with pytest.raises(DeviceRefused, match="is no regular file"):
            files(tmp_path, (folder, "m/"))


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"a\nb", b"a'b", b"-rf", b".hidden", b"a|b", b"\xc3\xa9"]
)
def test_names_in_a_folder_are_checked_too(tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"1")
    with pytest.raises(DeviceRefused, match="cannot be a name on a device"):
        files(tmp_path, (folder, "m/"))


def test_a_name_is_not_a_file_and_a_folder(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    with pytest.raises(DeviceRefused, match="a file and a folder"):
        files(tmp_path, (one, "lib"), (other, "lib/other"))


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "a/", "a/./b", "a" * 300])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(DeviceRefused):
        checked_path(path)


@pytest.mark.parametrize(
    "root",
    ["", " ", "/", "//", "/data", "/data/", "/data/local/tmp", "/data/local/tmp/",
     "/data/local/tmp/.", "/data/local/tmp/..",
     "/data/local/tmp/q/../..", "/sdcard", "/storage/emulated/0", "/system/q",
     "/vendor/lib64", "/proc/1", "/etc/q", "/home/me", "/root", "relative", "~", "/a b", "/a;b",
     "/$(id)", "/a\nb", "/usr/local/q"],
)  # fmt: skip
def test_dangerous_roots_are_refused(root: str) -> None:
    for transport in ("adb", "ssh"):
        with pytest.raises(DeviceRefused):
            checked_root(root, transport)


def test_roots_of_ones_own_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked_root("/data/local/tmp/qbuild/", "adb") == "/data/local/tmp/qbuild"
    assert checked_root("/home/me/qbuild", "ssh") == "/home/me/qbuild"
    monkeypatch.chdir(tmp_path)
    assert checked_root("out/device", "local") == str(tmp_path / "out/device")
    for root in (".", "..", str(tmp_path.parent), "~"):
        with pytest.raises(DeviceRefused):
            checked_root(root, "local")
