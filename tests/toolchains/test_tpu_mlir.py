"""What TPU-MLIR is given beside its wheel: a Python 3.10 that works, stand-ins that compute as the
originals do, and a `parallel` that runs its nets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from buildsys.toolchains.definitions import definition, folders_for
from buildsys.toolchains.installers import tpu_mlir_python
from buildsys.toolchains.installers.tpu_mlir_environment import compiler_environment, inside
from buildsys.toolchains.installers.tpu_mlir_python import VARIABLE, find_python310

SPEAKS = '#!/bin/sh\necho "cpython 3 10 $0"\n'
FAILS = '#!/bin/sh\necho "pyenv: python3.10: command not found" >&2\nexit 127\n'
OTHER = '#!/bin/sh\necho "cpython 3 11 $0"\n'


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def pyenv(tmp_path: Path) -> dict[str, str]:
    """A home with pyenv: its shim is on PATH and fails, the real one is not on PATH."""
    shim = program(tmp_path / "shims" / "python3.10", FAILS)
    program(tmp_path / "pyenv/versions/3.10.13/bin/python3.10", SPEAKS)
    root = str(tmp_path / "pyenv")
    path = f"{shim.parent}:/usr/bin:/bin"
    return {"PATH": path, "PYENV_ROOT": root, "UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv")}


def test_a_shim_that_fails_is_not_believed(pyenv: dict[str, str], tmp_path: Path) -> None:
    found, refused = find_python310(pyenv)
    assert found == str(tmp_path / "pyenv/versions/3.10.13/bin/python3.10")
    assert any("command not found" in line for line in refused)


def test_uvs_python_is_found_and_another_version_is_refused(
    pyenv: dict[str, str], tmp_path: Path
) -> None:
    program(tmp_path / "pyenv/versions/3.10.13/bin/python3.10", OTHER)
    own = program(tmp_path / "uv/cpython-3.10.20-linux/bin/python3.10", SPEAKS)
    found, refused = find_python310(pyenv)
    assert found == str(own)
    assert any("it is cpython 3 11" in line for line in refused)


def test_the_python_that_is_named_is_the_only_candidate(
    pyenv: dict[str, str], tmp_path: Path
) -> None:
    found, refused = find_python310({**pyenv, VARIABLE: str(tmp_path / "none")})
    assert found is None
    assert len(refused) == 1
    assert "No such file" in refused[0]


def test_the_candidates_run_without_the_callers_library(
    pyenv: dict[str, str], tmp_path: Path
) -> None:
    asks = '#!/bin/sh\n[ -z "$PYTHONHOME$PYTHONPATH" ] || exit 1\necho "cpython 3 10 x"\n'
    program(tmp_path / "pyenv/versions/3.10.13/bin/python3.10", asks)
    found, _ = find_python310({**pyenv, "PYTHONPATH": "/elsewhere", "PYTHONHOME": "/elsewhere"})
    assert found is not None


def test_every_pinned_requirement_has_a_digest_and_the_compilers_own_version_fits() -> None:
    described = definition("tpu-mlir", folders_for("recipes/recipe.yaml"))
    pinned: dict[str, str] = described["install"]["options"]["requirements"]
    assert pinned
    assert all("==" in name and len(digest) == 64 for name, digest in pinned.items())
    assert "tpu_mlir==1.30.2" in pinned
    assert tpu_mlir_python.HOW.count("3.10") > 2


def load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, inside(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in() -> Iterator[ModuleType]:
    """The stand-in for torch, without a trace of it afterwards."""
    before = dict(sys.modules)
    yield load("torch_stand_in", "torch_stand_in.py")
    for name in ("torch.nn", "torch.nn.functional"):
        sys.modules[name] = before[name]


def test_the_stand_in_rounds_to_bfloat16_as_torch_does(stand_in: Any) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype("u4")
    ties = (np.arange(0x3F80, 0x4080, dtype="u4") << 16) | 0x8000
    values = np.concatenate([bits, ties, ties + 1, ties - 1]).view("f4")
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    ours = stand_in.from_numpy(values).to(stand_in.bfloat16)
    is_number = ~np.isnan(values)
    own_bits = ours._array[is_number]
    assert (own_bits == theirs.view(torch.uint16).numpy()[is_number]).all()
    assert np.isnan(ours.float().numpy()[~is_number]).all()
    assert ours.numel() == theirs.numel()


def test_the_stand_in_reads_safetensors_as_torch_does(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.randn(4).to(torch.float16),
        "c": torch.randn(2, 2),
        "d": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    opened = load("safetensors_stand_in", "safetensors_stand_in.py").safe_open(
        str(tmp_path / "x.safetensors"), "pt"
    )
    assert set(opened.keys()) == set(tensors)
    for name, tensor in tensors.items():
        made = opened.get_tensor(name)
        assert made.dtype.name == str(tensor.dtype).removeprefix("torch.")
        value = made.float().numpy() if tensor.is_floating_point() else made.numpy()
        wide = tensor.float() if tensor.is_floating_point() else tensor
        assert np.array_equal(value, wide.numpy())


def test_the_stand_in_writes_an_embedding_as_the_converter_does(stand_in: Any) -> None:
    """The converter copies 16-bit rows from where they lie."""
    import ctypes

    values = np.random.default_rng(0).standard_normal((4, 6)).astype("f4")
    tensor = stand_in.from_numpy(values).to(stand_in.bfloat16)
    place = tensor.untyped_storage().data_ptr()
    copied = bytes((ctypes.c_byte * (tensor.numel() * 2)).from_address(place))
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy().tobytes()
    assert copied == expected


# `parallel`: what the converter calls for each net is a program that here joins what it is given.
DEPLOY = """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in
    --mlir) mlir=$2;; --model) model=$2;; --quantize) mode=$2;;
esac; shift; done
echo "$PWD $mlir" >> "$RAN"
[ ! -e "$RAN.fifo" ] || [ "$mode" = wait ] || until [ -e "$RAN.waits" ]; do :; done
[ "$mode" != fail ] || { echo "error: it is not possible" >&2; exit 3; }
[ "$mode" != wait ] || { echo > "$RAN.waits"; read -r _ < "$RAN.fifo"; }
cat "$mlir" ../weights.npz > "$model"
"""


class Nets:
    """A work folder with nets to compile, and what ran."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.ran = folder, folder / "ran"
        folder.mkdir()
        self.settings: dict[str, object] = {
            "jobs": 2, "memory": None, "kept": str(kept), "salt": ["1.30.2", "x"],
        }  # fmt: skip
        self.environment = compiler_environment(
            sys.executable, "/x", folder / "around", self.settings
        )
        program(folder / "around" / "bin" / "model_deploy.py", DEPLOY)
        self.weights = b"weights"

    def line(self, net: str, mode: str = "bf16") -> str:
        return (
            f"(pushd {net} &&  model_deploy.py --mlir {net}.mlir --chip bm1684x --model "
            f"{net}.bmodel --quantize {mode} --high_precision && popd ) > {net}.log"
        )

    def run(
        self, *nets: str, mode: str = "bf16", modes: Mapping[str, str] | None = None
    ) -> tuple[int, list[dict[str, Any]]]:
        (self.folder / "weights.npz").write_bytes(self.weights)
        for net in nets:
            (self.folder / net).mkdir(exist_ok=True)
            text = f'module @{net} attributes {{module.weight_file = "../weights.npz"}}'
            (self.folder / net / f"{net}.mlir").write_text(text)
        (self.folder / "around" / "nets.json").write_text(json.dumps(self.settings))
        done = subprocess.run(
            ["parallel", "-j", "4", "--halt", "now,fail=1", "--progress", "--joblog", "x"],
            cwd=self.folder,
            env={**self.environment, "RAN": str(self.ran)},
            input="".join(f"{self.line(net, (modes or {}).get(net, mode))}\n" for net in nets),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            executable=self.folder / "around" / "bin" / "parallel",
        )
        events = [json.loads(line)["qbuild"] for line in done.stdout.splitlines()]
        return done.returncode, events

    @property
    def count(self) -> int:
        return len(self.ran.read_text().splitlines()) if self.ran.exists() else 0


@pytest.fixture
def nets(tmp_path: Path) -> Callable[[str], Nets]:
    kept = tmp_path / "kept"
    kept.mkdir()
    return lambda name: Nets(tmp_path / name, kept)


def test_every_net_is_compiled_and_told(nets: Callable[[str], Nets]) -> None:
    work = nets("one")
    code, events = work.run("a", "b", "c")
    assert code == 0
    assert sorted(event["net"] for event in events) == ["a", "b", "c"]
    assert {event["total"] for event in events} == {3}
    assert (work.folder / "b" / "b.bmodel").read_bytes().endswith(b"weights")


def test_a_net_is_not_compiled_twice_unless_something_of_it_has_changed(
    nets: Callable[[str], Nets],
) -> None:
    first = nets("one")
    first.run("a", "b")
    again = nets("two")
    code, events = again.run("a", "b", "c")
    assert (code, again.count) == (0, 1)
    assert {event["net"]: event["kept"] for event in events} == {"a": True, "b": True, "c": False}
    made = (again.folder / "a" / "a.bmodel").read_bytes()
    assert made == (first.folder / "a" / "a.bmodel").read_bytes()

    for name, change in (
        ("weights", lambda work: setattr(work, "weights", b"others!")),
        ("version", lambda work: work.settings.update(salt=["1.30.3", "x"])),
    ):
        work = nets(name)
        change(work)
        work.run("a")
        assert work.count == 1, name
    work = nets("mode")
    work.run("a", mode="w4bf16")
    assert work.count == 1


def test_a_kept_net_that_was_damaged_is_compiled_again(
    nets: Callable[[str], Nets], tmp_path: Path
) -> None:
    nets("one").run("a")
    (kept,) = (tmp_path / "kept").glob("*/a.bmodel")
    kept.unlink()
    kept.write_bytes(b"damaged")
    work = nets("two")
    assert work.run("a")[0] == 0
    assert work.count == 1
    assert (work.folder / "a" / "a.bmodel").read_bytes().endswith(b"weights")


def test_a_failure_is_told_its_words_are_kept_and_nothing_of_it_is(
    nets: Callable[[str], Nets], tmp_path: Path
) -> None:
    work = nets("one")
    code, events = work.run("a", mode="fail")
    assert code == 1
    assert events == [{"net": "a", "failed": 3}]
    assert (work.folder / "a.err").read_text() == "error: it is not possible\n"
    assert not list((tmp_path / "kept").iterdir())


def test_a_failure_ends_the_others(nets: Callable[[str], Nets]) -> None:
    """One net waits for ever; the other fails once that one waits."""
    work = nets("one")
    os.mkfifo(f"{work.ran}.fifo")
    code, events = work.run("a", "b", modes={"a": "wait", "b": "fail"})
    assert code == 1
    assert events == [{"net": "b", "failed": 3}]
    assert work.count == 2


def test_a_task_that_is_none_of_the_converters_is_refused() -> None:
    module: Any = load("parallel", "parallel.py")
    with pytest.raises(SystemExit, match="no task of the converter's"):
        module.task_of("(pushd a && rm -rf / && popd ) > a.log")


def test_a_net_without_weights_is_a_net_too(nets: Callable[[str], Nets]) -> None:
    module: Any = load("parallel", "parallel.py")
    folder = nets("one").folder / "greedy_head"
    folder.mkdir()
    (folder / "greedy_head.mlir").write_text('module attributes {module.weight_file = "None"}')
    assert module.weight_file(str(folder), ["--mlir", "greedy_head.mlir"]) == ""


def test_tasks_wait_for_memory(nets: Callable[[str], Nets]) -> None:
    module: Any = load("parallel", "parallel.py")
    small = module.Task("", "a", [], [], 0)
    large = module.Task("", "b", [], [], 1 << 30)
    settings = {"jobs": 4, "memory": 2 << 30}
    assert module.has_room(large, [], 1.0, settings)  # alone it runs whatever it takes
    assert module.has_room(small, [small], 1.0, settings)
    assert not module.has_room(large, [small], 1.0, settings)
    assert not module.has_room(small, [small], 4.0, settings)  # they took more than was thought
    assert not module.has_room(small, [small], 1.0, {"jobs": 1, "memory": None})


def test_stand_ins_are_lent_only_to_a_compiler_without_torch(tmp_path: Path) -> None:
    settings = {"jobs": 1, "memory": None, "kept": None, "salt": ""}
    for name, lent in (("none", True), ("torch", False), ("torch.py", False)):
        package = tmp_path / name.replace(".", "-") / "tpu_mlir"
        package.mkdir(parents=True)
        if name != "none":
            (package.parent / name).mkdir()
        work = tmp_path / f"work-{package.parent.name}"
        found = compiler_environment("/usr/bin/python3", package, work, settings)
        modules = [Path(each) for each in found["PYTHONPATH"].split(os.pathsep)]
        assert any((each / "torch.py").is_file() for each in modules) == lent
