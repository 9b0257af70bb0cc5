"""recipes/mobilint.yaml from end to end on the shipped model, with a stand-in compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mobilint.install import install
from tests.mobilint.standin.recording import MXQ_MAGIC, read, sha256

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "mobilint.yaml"
TINY = ROOT / "recipes" / "assets" / "qwen2vl-tiny"
COMMAND = (sys.executable, "-m", "buildsys")
ARTIFACTS = 10

needs_model = pytest.mark.skipif(not TINY.is_dir(), reason="qwen2vl-tiny is not here")


def qbuild(folder: Path, *words: str, compiler: Path | None = None, **how: Any) -> Any:
    path = [str(ROOT), *([str(compiler)] if compiler is not None else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("QBUILD_MOBILINT_PYTHON", None)
    environment["QBUILD_CACHE"] = str(folder / "cache")  # nothing of another build's is taken
    start = how.pop("start", subprocess.run)
    return start([*COMMAND, *words], cwd=folder, env=environment, text=True, **how)


def build(folder: Path, compiler: Path | None, *words: str, **how: Any) -> Any:
    command = ("all", str(RECIPE), "-D", "samples=2", *words)
    return qbuild(folder, *command, compiler=compiler, capture_output=True, **how)


def contents(folder: Path) -> dict[str, bytes]:
    top = folder / "build" / "mobilint"
    return {
        file.relative_to(top).as_posix(): file.read_bytes()
        for file in top.rglob("*")
        if file.is_file() and ".qbuild" not in file.parts
    }


def done_lines(folder: Path) -> int:
    journal = folder / "build" / "mobilint" / ".qbuild" / "journal"
    return journal.read_bytes().count(b'"kind":"done"') if journal.is_file() else 0


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install("1.1", tmp_path_factory.mktemp("compiler"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compiler: Path) -> Path:
    folder = tmp_path_factory.mktemp("built")
    done = build(folder, compiler)
    assert done.returncode == 0, done.stderr
    return folder


@needs_model
def test_the_recipe_builds_the_folder_that_the_client_loads(built: Path, compiler: Path) -> None:
    found = contents(built)
    deploy = {name.removeprefix("deploy/") for name in found if name.startswith("deploy/")}
    assert deploy >= {
        "Qwen2-VL_text.mxq",
        "Qwen2-VL_vision.mxq",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    }
    top = built / "build" / "mobilint"
    rotation = sha256(top / "mxq/global_rotation.pth")
    for name in ("text", "vision"):
        assert read(top / f"deploy/Qwen2-VL_{name}.mxq", MXQ_MAGIC)["rotation"] == rotation
    config = json.loads(found["deploy/config.json"])
    assert config["mxq_path"] == "Qwen2-VL_text.mxq"
    assert config["core_mode"] == "global8"
    again = build(built, compiler)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout + again.stderr


@needs_model
def test_killed_after_every_step_it_ends_with_the_same_bytes(
    tmp_path: Path, built: Path, compiler: Path
) -> None:
    finished = runs = 0
    while True:
        runs += 1
        assert runs <= ARTIFACTS + 1
        process = qbuild(
            tmp_path, "all", str(RECIPE), "-D", "samples=2", compiler=compiler,
            start=subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        before = finished
        while done_lines(tmp_path) == before:
            try:
                process.wait(timeout=0.02)
                break
            except subprocess.TimeoutExpired:
                continue
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        finished = done_lines(tmp_path)
        assert finished > before
    assert done_lines(tmp_path) == ARTIFACTS  # no finished step was made again
    assert contents(tmp_path) == contents(built)


@needs_model
def test_without_the_compiler_it_stops_and_names_it(tmp_path: Path) -> None:
    done = build(tmp_path, None)
    assert done.returncode == 3
    assert done.stderr.count("toolchain 'mobilint-compiler' is not installed") == 1
    assert "qbcompiler" in done.stderr
    assert "QBUILD_MOBILINT_PYTHON" in done.stderr
    assert not contents(tmp_path)


@needs_model
def test_another_compiler_is_a_reason_that_is_told(built: Path, tmp_path: Path) -> None:
    """Its version is in the key: no mxq of an older one is taken for the new one's."""
    other = install("1.2", tmp_path / "compiler")
    why = qbuild(built, "why", "mblt/Qwen2-VL_language.mblt", compiler=other, capture_output=True)
    assert "1.2.0" in why.stdout + why.stderr
    assert "1.1.2" in why.stdout + why.stderr


@needs_model
def test_what_a_colleague_compiled_is_adopted_with_its_rotation(
    tmp_path: Path, built: Path
) -> None:
    """Without the compiler: both mblt, both mxq and the rotation come from elsewhere."""
    top = built / "build" / "mobilint"
    sets = qbuild(
        tmp_path, "build", str(RECIPE), "-D", "samples=2", "calibration/language/",
        "calibration/vision/", capture_output=True,
    )  # fmt: skip
    assert sets.returncode == 0, sets.stderr
    early = qbuild(
        tmp_path, "adopt", "mxq/Qwen2-VL_vision.mxq", str(top / "mxq/Qwen2-VL_vision.mxq"),
        capture_output=True,
    )  # fmt: skip
    assert early.returncode == 2
    assert "mxq/global_rotation.pth" in early.stderr
    for name, more in (
        ("mblt/Qwen2-VL_language.mblt", ()),
        ("mblt/Qwen2-VL_vision.mblt", ()),
        ("mxq/Qwen2-VL_text.mxq", (f"rotation={top / 'mxq/global_rotation.pth'}",)),
        ("mxq/Qwen2-VL_vision.mxq", ()),
    ):
        done = qbuild(tmp_path, "adopt", name, str(top / name), *more, capture_output=True)
        assert done.returncode == 0, done.stderr
    done = build(tmp_path, None)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(built)
