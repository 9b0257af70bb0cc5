"""Devices for tests: a phone with the real adbd, a board with the real sshd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devices.board import Board, NoBoard
from tests.devices.phone import SERIAL, NoPhone, Phone
from tests.devices.targets import Target


@pytest.fixture(scope="session")
def _phone_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone | str]:
    try:
        phone = Phone(tmp_path_factory.mktemp("phone"))
    except NoPhone as error:
        yield str(error)
        return
    yield phone
    phone.close()


@pytest.fixture
def phone(_phone_once: Phone | str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phone]:
    """The phone, plugged in, empty and with all its properties."""
    if isinstance(_phone_once, str):
        pytest.skip(f"no phone can be had here: {_phone_once}")
    for name, value in _phone_once.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    yield _phone_once
    _phone_once.order(mend=True)
    _phone_once.order(properties={})
    _phone_once.shell("rm -rf /data/local/tmp/* /data/local/tmp/.[a-z]*")


@pytest.fixture(scope="session")
def _board_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board | str]:
    try:
        board = Board(tmp_path_factory.mktemp("board"))
    except NoBoard as error:
        yield str(error)
        return
    yield board
    board.close()


@pytest.fixture
def board(_board_once: Board | str) -> Iterator[Board]:
    """The board, connected, its host key known."""
    if isinstance(_board_once, str):
        pytest.skip(f"no board can be had here: {_board_once}")
    yield _board_once
    _board_once.cable.mend()
    _board_once.know_host((_board_once.folder / "host_key.pub").read_text())


@pytest.fixture(params=["local", "adb", "ssh"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A device of each kind."""
    return make_target(request.param, request, tmp_path)


@pytest.fixture(params=["adb", "ssh"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A device at the end of a cable, of each kind."""
    return make_target(request.param, request, tmp_path)


@pytest.fixture
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return make_target("local", request, tmp_path)


def make_target(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    here = tmp_path / "device" / "qbuild"
    store = tmp_path / "host"
    store.mkdir()
    if kind == "local":
        return Target(kind, str(here), here, {}, None, store)
    if kind == "ssh":
        board = request.getfixturevalue("board")
        return Target(kind, str(here), here, board.where(), board, store)
    phone = request.getfixturevalue("phone")
    root = "/data/local/tmp/qbuild"
    return Target(kind, root, phone.root / root[1:], {"serial": SERIAL}, phone, store)
