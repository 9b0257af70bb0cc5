"""Devices that cannot be talked to: each says what is wrong and what to do, and none is guessed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from buildsys.devices.adb import AdbTransport, find_adb, only_one, parse_devices
from buildsys.devices.definitions import transport_of
from buildsys.devices.errors import DeviceError
from buildsys.devices.ssh import Address, SshTransport
from buildsys.devices.transport import call, quoted
from buildsys.errors import ToolchainMissing, UsageError
from tests.devices.board import Board
from tests.devices.phone import Phone
from tests.devices.phone_namespace import SILENT, UNAUTHORIZED
from tests.devices.targets import Target


@pytest.mark.parametrize(
    ("port", "state", "remedy"),
    [(UNAUTHORIZED, "unauthorized", "allow USB debugging"), (SILENT, "offline", "reconnect it")],
)
def test_a_phone_that_does_not_let_us_in(phone: Phone, port: int, state: str, remedy: str) -> None:
    phone.order(connect=str(port))
    try:
        with pytest.raises(DeviceError, match=state) as caught:
            AdbTransport(f"127.0.0.1:{port}").connect()
    finally:
        phone.order(forget=str(port))
    assert remedy in str(caught.value.remedy)
    assert caught.value.exit_code == 3


def test_two_phones_and_none_chosen(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    """ANDROID_SERIAL chooses nothing either: a deploy never depends on a hidden variable."""
    phone.order(connect=str(UNAUTHORIZED))
    monkeypatch.setenv("ANDROID_SERIAL", "127.0.0.1:16602")
    try:
        with pytest.raises(DeviceError, match="2 adb devices are attached"):
            AdbTransport().connect()
    finally:
        phone.order(forget=str(UNAUTHORIZED))
    monkeypatch.setenv("ANDROID_SERIAL", "somebody-else")
    transport = AdbTransport()
    transport.connect()
    assert call(transport, "echo it is me") == b"it is me\n"


def test_a_phone_that_is_not_attached(phone: Phone) -> None:
    with pytest.raises(DeviceError, match="not attached") as caught:
        AdbTransport("R5CT000").connect()
    assert "127.0.0.1:16602" in str(caught.value.remedy)
    with pytest.raises(DeviceError, match="not attached"):
        AdbTransport("127.0.0.1:1").connect()  # `adb connect` ends with 0 here


def test_no_phone_at_all() -> None:
    with pytest.raises(DeviceError, match="no adb device"):
        only_one({})


def test_what_adb_prints_is_read() -> None:
    listing = (
        "* daemon started successfully\nList of devices attached\n"
        "A1\tdevice\nB2\tunauthorized\nC3\tno permissions (udev rules); see [http://x]\n\n"
    )
    assert parse_devices(listing) == {"A1": "device", "B2": "unauthorized", "C3": "no permissions"}


@pytest.mark.parametrize("serial", ["-s", "-oProxyCommand=touch PWNED", "a b", "", "$(id)"])
def test_a_serial_cannot_be_an_option(serial: str) -> None:
    with pytest.raises(UsageError):
        AdbTransport(serial)


@pytest.mark.parametrize(
    ("host", "user"),
    [("-oProxyCommand=touch PWNED", None), ("a b", None), ("", None), ("board", "-l"),
     ("board;id", None), ("$(id)", None), ("board", "a b")],
)  # fmt: skip
def test_a_host_cannot_be_an_option(host: str, user: str | None) -> None:
    with pytest.raises(UsageError):
        SshTransport(Address(host, user))


def test_adb_is_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {}
    for name in ("option", "variable", "path/adb"):
        programs[name] = tmp_path / name
        programs[name].parent.mkdir(exist_ok=True)
        programs[name].write_text("#!/bin/sh\n")
        programs[name].chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("ADB", raising=False)
    assert find_adb() == str(programs["path/adb"])
    monkeypatch.setenv("ADB", str(programs["variable"]))
    assert find_adb() == str(programs["variable"])
    assert find_adb(str(programs["option"])) == str(programs["option"])
    with pytest.raises(ToolchainMissing, match="there is no adb at"):
        find_adb(str(tmp_path / "absent"))


def test_a_host_key_that_is_unknown_or_changed_is_refused(board: Board) -> None:
    for known, remedy in (("", "log in once"), (other_key(board), "has changed")):
        board.know_host(known)
        transport = SshTransport(Address(**board.where()))
        with pytest.raises(DeviceError, match=r"^error: ssh 127") as caught:
            transport.connect()
        transport.close()
        assert remedy in str(caught.value.remedy)
        assert caught.value.exit_code == 3


def other_key(board: Board) -> str:
    return (board.folder / "other_key.pub").read_text()


def test_a_board_that_takes_none_of_our_keys(board: Board) -> None:
    where = {**board.where(), "identity": str(board.folder / "other_key")}
    transport = SshTransport(Address(**where))
    with pytest.raises(DeviceError, match="Permission denied"):
        transport.connect()
    transport.close()


def test_a_board_that_is_off(board: Board) -> None:
    board.cable.cut()
    transport = SshTransport(Address(**board.where()))
    with pytest.raises(DeviceError):
        transport.connect()
    transport.close()


def test_a_board_without_a_host_says_where_to_write_it(local: Target) -> None:
    with pytest.raises(UsageError, match="where is the device") as caught:
        transport_of(replace(local.device, transport="ssh"))
    assert "devices.yaml" in str(caught.value.remedy)


def test_every_text_is_one_word_to_every_shell(target: Target) -> None:
    """Random texts of everything that shells give a meaning to; fixed seed."""
    import random

    chance = random.Random(7)
    signs = "ab $`'\"\\\n;&|<>(){}[]*?~!#%^=-é☃\t"
    texts = ["".join(chance.choices(signs, k=chance.randrange(12))) for _ in range(400)]
    transport = transport_of(target.device)
    transport.connect()
    words = " ".join(quoted(text) for text in texts)
    try:
        said = call(transport, f'set -- {words}; for each in "$@"; do printf "%s\\0" "$each"; done')
    finally:
        transport.close()
    assert said.decode().split("\0")[:-1] == texts
