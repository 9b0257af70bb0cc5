"""Cables are pulled, disks fill up, qbuild is killed: old or new, never something between."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from buildsys.devices.definitions import transport_of
from buildsys.devices.errors import CommandFailed, DeviceError, DeviceRefused
from buildsys.devices.remote_folder import RemoteFolder
from tests.devices.phone import REPOSITORY, SERIAL, Phone
from tests.devices.targets import Target, noise

MIB = 1 << 20
OLD, NEW = noise(2 * MIB, 1), noise(8 * MIB, 2)


def cut_after(target: Target, count: int) -> None:
    """Pull the cable once `count` more bytes have gone to the device."""
    if target.kind == "adb":
        target.machine.order(cut_after=count)
    else:
        target.machine.cable.cut_after(count)


def mend(target: Target) -> None:
    if target.kind == "adb":
        target.machine.order(mend=True)
    else:
        target.machine.cable.mend()


def test_a_cut_while_sending_keeps_the_old_file_and_the_sent_bytes(remote: Target) -> None:
    remote.deploy(remote.file("model", OLD))
    cut_after(remote, 5 * MIB)
    with pytest.raises(DeviceError) as caught:
        remote.deploy(remote.file("model", NEW))
    assert caught.value.exit_code == 3
    assert remote.content() == {"model": OLD}
    (part,) = remote.parts()
    have = part.read_bytes()
    assert len(have) > MIB
    assert NEW.startswith(have)
    assert have != NEW
    mend(remote)
    assert remote.deploy(remote.file("model", NEW)) == 0
    assert remote.content() == {"model": NEW}
    # The device may have been writing still when the part was read above.
    assert 0 < remote.notes.sent <= len(NEW) - len(have)


@pytest.mark.parametrize("count", [1, 600, 3_000, 5_000, 7_000, 10_000, 13_000, 17_000, 30_000])
def test_a_cut_anywhere_leaves_old_or_new(remote: Target, count: int) -> None:
    """Small files, so that the cut falls into every stage in turn."""
    old = {"a": b"old a", "b": b"old b", "bin/c": b"old c"}
    new = {"a": noise(2000, 1), "b": noise(2000, 2), "bin/c": noise(2000, 3)}
    remote.deploy(*(remote.file(name, content) for name, content in old.items()))
    files = [remote.file(name, content) for name, content in new.items()]
    cut_after(remote, count)
    with contextlib.suppress(DeviceError):
        remote.deploy(*files)
    for name, content in remote.content().items():
        assert content in (old[name], new[name])
    mend(remote)
    assert remote.deploy(*files) == 0
    assert remote.content() == new
    assert remote.parts() == []


def test_another_model_does_not_go_on_from_this_ones_part(remote: Target) -> None:
    cut_after(remote, 5 * MIB)
    with pytest.raises(DeviceError):
        remote.deploy(remote.file("model", NEW))
    mend(remote)
    other = noise(8 * MIB, 3)
    assert remote.deploy(remote.file("model", other)) == 0
    assert remote.content() == {"model": other}
    assert remote.notes.sent == len(other)


DEPLOY = """
import sys, threading
from pathlib import Path
from buildsys.devices.definitions import Device
from tests.devices.targets import Target
kind, root, here, store, serial = sys.argv[1:]
target = Target(kind, root, Path(here), {"serial": serial}, None, Path(store))
file = target.file("model", Path(store, "new").read_bytes())
target.deploy(file)
"""


def test_killed_while_sending_it_goes_on_from_there(
    phone: Phone, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """SIGKILL: neither its clients nor its lock outlive it, and what was sent counts."""
    here = phone.root / "data/local/tmp/qbuild"
    target = Target("adb", "/data/local/tmp/qbuild", here, {"serial": SERIAL}, phone, tmp_path)
    target.deploy(target.file("model", OLD))
    (tmp_path / "new").write_bytes(NEW)
    phone.order(hold_after=4 * MIB)
    words = ["adb", target.device.root, str(here), str(tmp_path), SERIAL]
    process = subprocess.Popen([sys.executable, "-c", DEPLOY, *words], cwd=REPOSITORY)
    phone.order(wait_until_held=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    phone.order(mend=True)
    assert target.content() == {"model": OLD}
    assert target.deploy(target.file("model", NEW)) == 0
    assert target.content() == {"model": NEW}
    assert target.notes.sent < len(NEW) - MIB


def test_stopped_while_sending_it_goes_on_from_there(target: Target) -> None:
    stop = threading.Event()

    def heard(kind: str) -> None:
        if kind == "progress":
            stop.set()

    target.deploy(target.file("model", OLD))
    with pytest.raises(DeviceError, match="stopped"):
        target.deploy(target.file("model", NEW), stop=stop, on=heard)
    assert target.content() == {"model": OLD}
    assert target.deploy(target.file("model", NEW)) == 0
    assert 0 < target.notes.sent < len(NEW)
    assert target.content() == {"model": NEW}


def test_a_disk_too_small_is_refused_before_a_byte(phone: Phone, tmp_path: Path) -> None:
    phone.order(disk=8 * MIB, at="/data/small")
    at = {"serial": SERIAL}
    target = Target("adb", "/data/small/q", tmp_path, at, phone, tmp_path)
    target.deploy(target.file("model", OLD))
    with pytest.raises(DeviceRefused, match="are needed and"):
        target.deploy(target.file("model", NEW))
    assert target.notes.of("sending") == []
    listed = phone.shell("cd /data/small/q; ls .qb; stat -c %s model")
    assert "part" not in listed
    assert listed.split()[-1] == str(len(OLD))
    # Without its predecessor it fits.
    middle = target.file("model", noise(6 * MIB, 4))
    with pytest.raises(DeviceRefused, match="--replace-in-place"):
        target.deploy(middle)
    assert target.deploy(middle, replace_in_place=True) == 0


def test_a_disk_that_fills_up_while_sending_loses_nothing(phone: Phone, tmp_path: Path) -> None:
    phone.order(disk=8 * MIB, at="/data/full")
    root = "/data/full/q"
    target = Target("adb", root, tmp_path, {"serial": SERIAL}, phone, tmp_path)
    target.deploy(target.file("model", b"old"))
    transport = transport_of(target.device)
    transport.connect()
    folder = RemoteFolder(transport, root)
    file = target.file("model", noise(6 * MIB, 4))
    phone.shell(f"head -c {4 * MIB} /dev/zero > /data/full/filler")
    with pytest.raises(CommandFailed, match="No space left on device") as caught:
        folder.send(file.path, file.facts.sha256, lambda offset: None, threading.Event())
    assert caught.value.remedy is not None
    assert phone.shell(f"cat {root}/model") == "old"
    phone.shell("rm /data/full/filler")
    assert target.deploy(file) == 0
    assert 0 < target.notes.sent < file.facts.size
    digest = phone.shell(f"sha256sum {root}/model").split()[0]
    assert digest == file.facts.sha256


def test_a_root_that_cannot_be_written_is_refused(local: Target) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    local.here.parent.mkdir()
    local.here.parent.chmod(0o555)
    with pytest.raises(DeviceError, match="Permission denied"):
        local.deploy(local.file("model", b"1"))


def test_a_deploy_cut_between_renames_does_not_run(local: Target) -> None:
    """Old and new files side by side are no model: the run script says so."""
    local.deploy(local.program("echo ran"))
    (local.here / ".qb/placing").touch()
    words = ["sh", str(local.here / ".qb/run.sh")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "a deploy was cut here" in done.stderr
    assert local.deploy(local.program("echo ran"), run=True) == 0
    assert local.notes.printed["stdout"] == b"ran\n"
