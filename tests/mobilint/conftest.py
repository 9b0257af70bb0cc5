"""A stand-in compiler on the path, and what rules need to call it."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from buildsys.rules.mobilint import running
from buildsys.toolchains.definitions import definition
from buildsys.toolchains.finding import Found, find
from tests.mobilint.install import install
from tests.rules.conftest import make, step

__all__ = ["make", "step"]
PACKAGES = ("qubee", "qbcompiler", "standin")
TOOLCHAINS = Path(__file__).resolve().parents[2] / "toolchains"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, str]]:
    """compiler("1.1"): a stand-in of that generation is installed; what a step is told of it."""

    def prepare(generation: str) -> dict[str, str]:
        folder = tmp_path / f"compiler-{generation}"
        if not folder.exists():
            install(generation, folder)
        others = [entry for entry in sys.path if not entry.startswith(str(tmp_path))]
        monkeypatch.setattr(sys, "path", [str(folder), *others])
        found = find(definition("mobilint-compiler", [str(TOOLCHAINS)]), {})
        assert isinstance(found, Found), found
        return dict(found.fields)

    return prepare


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's programs run in this process: a new one imports torch for ten seconds.

    The same files, arguments and working folder; `test_the_compiler_runs_in_a_process_of_its_own`
    and the build from the recipe do it the real way.
    """

    def run(context: Any, argv: Any, work: Path, extra: Any = None) -> None:
        for name in [each for each in sys.modules if each.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        said = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(said):
            patch.chdir(work)
            for name, value in (extra or {}).items():
                patch.setenv(name, value)
            by_name = argv[1] == "-m"
            patch.setattr(sys, "argv", list(argv[2:] if by_name else argv[1:]))
            code, error = 0, ""
            try:
                if by_name:
                    runpy.run_module(argv[2], run_name="__main__", alter_sys=False)
                else:
                    runpy.run_path(argv[1], run_name="__main__")
            except SystemExit as stop:
                code, error = (
                    (stop.code or 0, "") if not isinstance(stop.code, str) else (1, stop.code)
                )
            except Exception as raised:  # as a process: whatever is raised ends it
                code, error = 1, "".join(traceback.format_exception(raised)[-3:])
        lines = [*said.getvalue().splitlines(), error]
        program = "import sys; [print(line) for line in sys.argv[2:]]; sys.exit(int(sys.argv[1]))"
        real_run(context, [sys.executable, "-S", "-c", program, str(code), *lines], work)

    real_run = running.run
    monkeypatch.setattr(running, "run", run)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(2):
        pixels = generator.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def digest_of(path: Path) -> Any:
    from blake3 import blake3

    return blake3(path.read_bytes()).hexdigest()
