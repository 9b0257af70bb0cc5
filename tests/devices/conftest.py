"""Devices for tests: a phone with the real adbd, a board with the real sshd, a folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.devices.phone import NoPhone, Phone


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
