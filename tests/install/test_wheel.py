"""An installed wheel, used away from the clone, works the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(wheel, check=True, timeout=300)
    (built,) = folder.glob("qbuild-*.whl")
    site = folder / "site"
    install = [*pip, "install", "--no-deps", "--target", str(site), str(built)]
    subprocess.run(install, check=True, timeout=300)
    return site


def qbuild(installed: Path, project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "80"}
    environment["QBUILD_CACHE"] = str(project / "cache")
    return subprocess.run(
        [sys.executable, "-P", "-m", "buildsys", *words],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_wheel_carries_recipes_models_and_templates(installed: Path, tmp_path: Path) -> None:
    where = "import buildsys.share as s; print(s.PACKAGE)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    printed = subprocess.run(
        [sys.executable, "-P", "-c", where],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == str(installed / "buildsys")
    checked = qbuild(installed, tmp_path, "check", "recipes/qwen2vl.yaml")
    assert checked.returncode == 0, checked.stderr


def test_wheel_builds_away_from_the_clone(installed: Path, tmp_path: Path) -> None:
    built = qbuild(installed, tmp_path, "build", "recipes/qwen2vl.yaml", "vocab.mllm")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "build/qwen2vl/vocab.mllm").stat().st_size > 0
    again = qbuild(installed, tmp_path, "build", "recipes/qwen2vl.yaml", "vocab.mllm")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout + again.stderr
