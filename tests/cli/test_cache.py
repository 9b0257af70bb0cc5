"""--cache and `qbuild cache`, with real processes, a real web server and a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_build import artifacts
from tests.store.conftest import s3_url, web
from tests.store.servers import WebServer

__all__ = ["s3_url", "web"]  # fixtures

RECIPE = """\
qbuild: 1
name: tiny
sources: {src: {file: src.txt}}
artifacts:
  a: {rule: command, inputs: {i: src}, options: {argv: [cp, "${in.i}", "${out}"]}}
  large:
    rule: command
    inputs: {i: a}
    options: {argv: [sh, -c, 'yes "$(cat $0)" | head -c 3000000 > $1', "${in.i}", "${out}"]}
  d/:
    rule: command
    inputs: {i: large}
    options: {argv: [sh, -c, 'mkdir $1; cp $0 $1/f; echo >$1/run; chmod 755 $1/run', "${in.i}", "${out}"]}
"""  # noqa: E501  (one command, one line)


class Checkout:
    """A clone of the project on a machine of its own: its own store, the same key."""

    def __init__(self, root: Path, store: str = "store", key: bool = True) -> None:
        self.root = root
        root.mkdir()
        (root / "tiny.yaml").write_text(RECIPE)
        (root / "src.txt").write_text("one\n")
        own = {"QBUILD_CACHE": str(root / store), "XDG_CONFIG_HOME": str(root / "config")}
        self.environment = {**os.environ, **own, "COLUMNS": "80"}
        if key:
            self.environment["QBUILD_CACHE_KEY"] = "ab" * 32

    def qbuild(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "buildsys", *words],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def artifacts(self) -> dict[str, str]:
        return artifacts(self.root / "build/tiny")


@pytest.fixture(params=["file", "http", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    if request.param == "http":
        server: WebServer = request.getfixturevalue("web")
        return server.url
    return f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"


def test_second_checkout_gets_every_artifact_and_runs_no_step(url: str, tmp_path: Path) -> None:
    one, two = Checkout(tmp_path / "one"), Checkout(tmp_path / "two")
    first = one.qbuild("all", "tiny.yaml", "--cache", url)
    assert (first.returncode, first.stdout) == (0, "built 3\n"), first.stderr
    second = two.qbuild("all", "tiny.yaml", "--cache", url)
    assert (second.returncode, second.stdout) == (0, "built 0, restored 3\n"), second.stderr
    assert "large (from the shared cache)" in second.stderr
    assert two.artifacts == one.artifacts
    assert os.access(two.root / "build/tiny/d/run", os.X_OK)
    null = two.qbuild("all", "tiny.yaml", "--cache", url)
    assert (null.stdout, null.stderr) == ("nothing to do: 3 artifacts are up to date\n", "")


def test_without_a_key_the_cache_is_only_read_and_that_is_said(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    one, two = Checkout(tmp_path / "one"), Checkout(tmp_path / "two", key=False)
    said = two.qbuild("all", "tiny.yaml", "--cache", url)
    assert "reading from --cache only" in said.stderr
    assert not (tmp_path / "shared").exists()
    one.qbuild("all", "tiny.yaml", "--cache", url)
    assert two.qbuild("clean", "--all").returncode == 0
    shutil.rmtree(two.root / "store")
    assert two.qbuild("all", "tiny.yaml", "--cache", url).stdout == "built 0, restored 3\n"


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/cache"


def test_silent_cache_costs_its_patience_once_and_one_warning(silent: str, tmp_path: Path) -> None:
    one = Checkout(tmp_path / "one")
    began = time.monotonic()
    done = one.qbuild("all", "tiny.yaml", "--cache", silent)
    assert time.monotonic() - began < 8
    assert (done.returncode, done.stdout) == (0, "built 3\n")
    assert done.stderr.count("warning") == 1


def test_interrupt_does_not_wait_for_a_silent_cache(silent: str, tmp_path: Path) -> None:
    one = Checkout(tmp_path / "one")
    with subprocess.Popen(
        [sys.executable, "-m", "buildsys", "all", "tiny.yaml", "--cache", silent, "-v"],
        cwd=one.root,
        env=one.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "a: never built" not in process.stderr.readline():
            continue
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert time.monotonic() - began < 2
    assert process.returncode == 128 + signal.SIGINT


def test_mistaken_cache_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    one = Checkout(tmp_path / "one")
    done = one.qbuild("all", "tiny.yaml", "--cache", "/srv/cache")
    assert done.returncode == 2
    assert "is not a URL" in done.stderr
    one.environment["QBUILD_CACHE_KEY"] = "short"
    done = one.qbuild("all", "tiny.yaml", "--cache", f"file://{tmp_path}/shared")
    assert done.returncode == 2
    assert "qbuild cache key --new" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_cache_writes_none(tmp_path: Path) -> None:
    one = Checkout(tmp_path / "one")
    assert one.qbuild("all", "tiny.yaml", "--no-cache").stdout == "built 3\n"
    assert not (one.root / "store").exists()


def test_stats_verify_and_gc_of_a_store_in_use(tmp_path: Path) -> None:
    one = Checkout(tmp_path / "one")
    url = f"file://{tmp_path}/shared"
    one.qbuild("all", "tiny.yaml", "--cache", url)
    stats = json.loads(one.qbuild("cache", "stats", "--json").stdout)
    assert (stats["records"], stats["blobs"]) == (3, 3)
    assert stats["folders"] == [str(one.root / "build/tiny")]
    assert stats["size"] == 4 + 3_000_000 + 1
    assert str(one.root / "build/tiny") in one.qbuild("cache", "stats").stdout
    checked = one.qbuild("cache", "verify")
    assert (checked.returncode, "0 wrong" in checked.stdout) == (0, True)
    assert "removed 0 steps and 0 blobs" in one.qbuild("cache", "gc", "--max", "1B").stdout
    (blob,) = (path for path in (one.root / "store/cas").rglob("*") if path.stat().st_size == 4)
    blob.chmod(0o644)
    blob.write_text("two\n")
    checked = one.qbuild("cache", "verify")
    assert checked.returncode == 1
    assert f"removed {blob.name}: its bytes had changed" in checked.stdout
    assert "1 wrong; 1 steps can no longer be restored" in checked.stdout
    assert one.qbuild("cache", "gc", "--keep", "1x").returncode == 2


def test_key_is_made_once_and_where_it_is_said(tmp_path: Path) -> None:
    one = Checkout(tmp_path / "one", key=False)
    missing = one.qbuild("cache", "key")
    assert (missing.returncode, "qbuild cache key --new" in missing.stderr) == (2, True)
    path = one.root / "config/qbuild/cache.key"
    assert str(path) in one.qbuild("cache", "key", "--new").stdout
    assert one.qbuild("cache", "key").stdout == f"{path}\n"
    assert one.qbuild("cache", "key", "--new").returncode == 2
