"""Stores, and a shared cache behind each kind of URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from blake3 import blake3

from buildsys.store.actions import Action, Entry
from buildsys.store.local import LINKED, Put, Store
from tests.store.servers import WebServer

KEY = b"k" * 32
LARGE = LINKED + 12345
FACTS = {"wall": 1.5, "cpu": 1.0, "memory": 1 << 20, "notes": {}, "warnings": []}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


Put_ = Callable[[Store, str, Mapping[str, bytes]], Action]


def key_of(word: str) -> str:
    return blake3(word.encode()).hexdigest()


def put(store: Store, folder: Path, word: str, files: Mapping[str, bytes]) -> Action:
    """Write files below a folder and store them as one action; names ending in "!" run."""
    entries, places = [], {}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = blake3(content).hexdigest()
        entry = Entry(name, digest, len(content), name.endswith("!"))
        path.chmod(0o755 if entry.executable else 0o644)
        entries.append(entry)
        places[name] = str(path)
        store.link_in(str(path), entry)
    folders = sorted({name.partition("/")[0] for name in files if "/" in name})
    action = Action(tuple(entries), tuple(folders), FACTS, {"step": word})
    store.put([Put(key_of(word), action, places)])
    return action


def restored(store: Store, folder: Path, word: str) -> dict[str, bytes] | None:
    """What the store gives back under a key."""
    key = key_of(word)
    action = store.action(key)
    if action is None or not store.restore(key, action, str(folder)):
        return None
    return {entry.path: (folder / entry.path).read_bytes() for entry in action.files}


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The URL of a bucket on a real S3 server; the variables that clients read are set."""
    pytest.importorskip("s3fs", reason="the extra [s3] is not installed")
    pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="artifacts")
        yield "s3://artifacts/qbuild"
    server.stop()


@pytest.fixture(params=["memory", "file", "http", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty shared cache."""
    kind = request.param
    if kind == "memory":
        return f"memory://{tmp_path.name}"
    if kind == "file":
        return f"file://{tmp_path}/shared"
    if kind == "http":
        server: WebServer = request.getfixturevalue("web")
        return server.url
    return f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
