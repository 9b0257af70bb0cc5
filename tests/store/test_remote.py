"""The shared cache, on real servers: complete and right, or as if it were not there."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from buildsys.errors import UsageError
from buildsys.store import http_transport, packing
from buildsys.store.actions import Action, encode
from buildsys.store.local import Store
from buildsys.store.remote import Remote, blob_name, without_password
from buildsys.store.signing import make_key, read_key, sign
from buildsys.store.transport import check_url, open_transport
from tests.store.conftest import FACTS, KEY, LARGE, key_of, put, restored
from tests.store.servers import WebServer

NOISE = random.Random(7).randbytes(LARGE)
FILES = {
    "a": b"one",
    "dir/packs": b"weights " * 200_000,
    "dir/run!": b"#!/bin/sh\n",
    "noise": NOISE,
}
STEP = key_of("step")


class Side:
    """One machine: its own store, and the shared cache with a key or without."""

    def __init__(self, root: Path, url: str, key: bytes | None = KEY) -> None:
        self.store = Store(str(root / "store"))
        self.root = root
        self.said: list[str] = []
        self.remote = Remote(url, key, self.store, self.said.append)

    def shares(self, word: str = "step", files: dict[str, bytes] | None = None) -> Action:
        action = put(self.store, self.root / "out", word, FILES if files is None else files)
        assert self.remote.share(key_of(word), action, anew=True), self.said
        return action

    def fetches(self, word: str = "step") -> dict[str, bytes] | None:
        if self.remote.fetch(key_of(word)) is None:
            return None
        return restored(self.store, self.root / "in", word)


def one(tmp_path: Path, url: str, key: bytes | None = KEY) -> Side:
    return Side(tmp_path / "one", url, key)


def other(tmp_path: Path, url: str, key: bytes | None = KEY) -> Side:
    return Side(tmp_path / "other", url, key)


def test_what_one_machine_shares_another_gets(url: str, tmp_path: Path) -> None:
    one(tmp_path, url).shares()
    side = other(tmp_path, url)
    assert side.fetches() == FILES
    assert os.access(tmp_path / "other/in/dir/run!", os.X_OK)
    assert side.remote.fetch(key_of("another")) is None
    assert side.said == []
    assert os.listdir(f"{side.store.root}/tmp") == []


def test_without_a_key_it_is_read_and_never_written(url: str, tmp_path: Path) -> None:
    side = one(tmp_path, url, None)
    action = put(side.store, tmp_path / "x", "step", FILES)
    assert not side.remote.share(STEP, action, anew=True)
    assert not open_transport(url).exists(f"ac/{STEP}")
    Side(tmp_path / "two", url).shares()
    assert other(tmp_path, url, None).fetches() == FILES


def test_record_that_another_key_sealed_is_refused(url: str, tmp_path: Path) -> None:
    one(tmp_path, url, b"z" * 32).shares()
    side = other(tmp_path, url)
    assert side.fetches() is None
    assert [line for line in side.said if "not sealed with your key" in line]
    assert side.remote.reads
    side.shares()  # and what is made here takes its place
    assert Side(tmp_path / "third", url).fetches() == FILES


def overwrite(url: str, tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / "poison"
    path.write_bytes(data)
    open_transport(url).upload(str(path), name)


def content(url: str, name: str) -> bytes:
    data = bytearray()
    assert open_transport(url).read(name, data.extend)
    return bytes(data)


POISON: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "other": lambda data: b"A" * len(data),
}


@pytest.mark.parametrize("how", POISON)
@pytest.mark.parametrize("path", ["a", "dir/packs", "noise"])
def test_poisoned_blob_is_refused_and_replaced(
    web: WebServer, tmp_path: Path, path: str, how: str
) -> None:
    action = one(tmp_path, web.url).shares()
    (entry,) = [each for each in action.files if each.path == path]
    name = blob_name(entry.digest, packed=path == "dir/packs")
    overwrite(web.url, tmp_path, name, POISON[how](content(web.url, name)))
    side = other(tmp_path, web.url)
    found = side.fetches()
    if how == "longer" and path == "dir/packs":  # zstd ends where it ends: the bytes are right
        assert found == FILES
        return
    assert found is None
    assert not os.path.exists(side.store.blob(entry.digest))
    assert side.store.action(STEP) is None
    (line,) = side.said
    assert path in line
    assert "is not what its record says; not used" in line
    side.shares()
    assert Side(tmp_path / "third", web.url).fetches() == FILES


@pytest.mark.parametrize("how", POISON)
def test_poisoned_record_is_refused(web: WebServer, tmp_path: Path, how: str) -> None:
    one(tmp_path, web.url).shares()
    name = f"ac/{STEP}"
    overwrite(web.url, tmp_path, name, POISON[how](content(web.url, name)))
    side = other(tmp_path, web.url)
    assert side.fetches() is None
    assert "not sealed with your key; not used" in side.said[0]


def test_sealed_record_moved_under_another_key_is_refused(web: WebServer, tmp_path: Path) -> None:
    one(tmp_path, web.url).shares()
    record = content(web.url, f"ac/{STEP}")
    overwrite(web.url, tmp_path, f"ac/{key_of('victim')}", record)
    side = other(tmp_path, web.url)
    assert side.fetches("victim") is None
    assert "another key" in side.said[0]


def test_blob_that_would_unpack_to_more_than_promised_is_cut_off(
    web: WebServer, tmp_path: Path
) -> None:
    import zstandard

    small = blake3(b"small").hexdigest()
    action = Action((("f", small, 5, False),), (), FACTS, {})  # type: ignore[arg-type]  # as JSON
    record = sign(KEY, encode(STEP, action, packed=[small]))
    overwrite(web.url, tmp_path, f"ac/{STEP}", record)
    bomb = zstandard.compress(bytes(200 << 20))
    overwrite(web.url, tmp_path, blob_name(small, packed=True), bomb)
    written: list[int] = []
    sink = packing.Verifier(lambda data: written.append(len(data)), 5, packed=True)
    with pytest.raises(packing.TooLong):
        sink.write(bomb)
    assert sum(written) <= 5
    assert other(tmp_path, web.url).fetches() is None


def test_blobs_are_packed_only_where_it_pays(web: WebServer, tmp_path: Path) -> None:
    action = one(tmp_path, web.url).shares()
    names = {path.removeprefix("/qbuild/") for path in web.shelf}
    digests = {entry.path: entry.digest for entry in action.files}
    for path in FILES:
        assert blob_name(digests[path], packed=path == "dir/packs") in names
    packed = blob_name(digests["dir/packs"], packed=True)
    assert len(web.shelf[f"/qbuild/{packed}"]) < len(FILES["dir/packs"]) / 10


def test_blobs_come_before_the_record_and_only_once(web: WebServer, tmp_path: Path) -> None:
    side = one(tmp_path, web.url)
    side.shares()
    puts = [line for line in web.asked if line.startswith("PUT")]
    assert puts[-1] == f"PUT /qbuild/ac/{STEP}"
    assert len(puts) == len(FILES) + 1
    side.shares("again")
    puts = [line for line in web.asked if line.startswith("PUT")][len(puts) :]
    assert puts == [f"PUT /qbuild/ac/{key_of('again')}"]


def test_cache_that_refuses_connections_is_reported_once_and_costs_nothing(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    side = one(tmp_path, f"http://me:secret@127.0.0.1:{port}/")
    began = time.monotonic()
    for number in range(100):
        assert side.remote.fetch(key_of(str(number))) is None
    assert time.monotonic() - began < 1.0
    (line,) = side.said
    assert f"the cache http://127.0.0.1:{port}/ cannot be used" in line
    assert "secret" not in line
    action = put(side.store, tmp_path / "x", "step", {"f": b"1"})
    assert not side.remote.share(STEP, action, anew=True)
    assert len(side.said) == 1


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_cache_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("buildsys.store.transport.READ_SECONDS", 0.2)
    monkeypatch.setattr(http_transport, "READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if scheme == "s3":
            pytest.importorskip("s3fs", reason="the extra [s3] is not installed")
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
            monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        side = one(tmp_path, f"{address}/c" if scheme == "http" else "s3://silent/c")
        began = time.monotonic()
        assert side.remote.fetch(STEP) is None
        assert side.remote.fetch(key_of("more")) is None
        assert time.monotonic() - began < 5
    assert len(side.said) == 1


def test_server_that_takes_nothing_can_still_be_read(web: WebServer, tmp_path: Path) -> None:
    one(tmp_path, web.url).shares()
    web.read_only = True
    side = other(tmp_path, web.url)
    action = put(side.store, tmp_path / "x", "new", {"f": b"1"})
    assert not side.remote.share(key_of("new"), action, anew=True)
    assert not side.remote.share(key_of("new"), action, anew=True)
    (line,) = side.said
    assert "takes nothing (403" in line
    assert side.fetches() == FILES


def test_connection_that_the_server_closed_is_opened_again(web: WebServer, tmp_path: Path) -> None:
    side = one(tmp_path, web.url)
    side.shares()
    transport = side.remote._there()
    assert isinstance(transport, http_transport.HttpTransport)
    transport._local.connection.sock.shutdown(socket.SHUT_RDWR)
    assert side.remote.fetch(STEP) is not None
    assert side.said == []


@pytest.mark.parametrize(
    ("url", "says"),
    [("nowhere", "is not a URL"), ("xyz://a", "no driver is known"), ("oci://a", "ocifs")],
)
def test_url_that_nothing_can_open_is_an_error(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_url(url)


def test_password_is_never_shown() -> None:
    assert without_password("https://me:secret@host:8443/x") == "https://host:8443/x"
    assert without_password("s3://bucket/x") == "s3://bucket/x"


def test_key_file_is_private_and_made_once(tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert read_key(environment) is None
    path = make_key(environment)
    key = read_key(environment)
    assert key is not None
    assert len(key) == 32
    assert os.stat(path).st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="there is a key already"):
        make_key(environment)
    os.chmod(path, 0o644)
    with pytest.raises(UsageError, match="can be read by others"):
        read_key(environment)
    assert read_key({**environment, "QBUILD_CACHE_KEY": "ab" * 32}) == b"\xab" * 32
    with pytest.raises(UsageError, match="not a key of 64"):
        read_key({"QBUILD_CACHE_KEY": "short"})
