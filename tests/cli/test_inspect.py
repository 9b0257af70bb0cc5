"""`qbuild inspect`: names, types, shapes and bytes of every format, for eyes and for scripts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from buildsys.cli import inspect
from buildsys.cli.main import main
from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.description import describe
from buildsys.formats.mllm_types import MllmType, block_entry, plain_entry
from buildsys.formats.mllm_v1 import MllmV1Writer
from buildsys.formats.mllm_v2 import MllmV2Writer
from buildsys.formats.rotation_file import Rotation, save_rotation
from buildsys.formats.safetensors_file import save_safetensors
from buildsys.formats.torch_archive import save_state_dict
from tests.cli.conftest import Qbuild

TENSORS = {
    "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "scale": torch.tensor(2.0),
    "x": torch.zeros(2, 5, dtype=torch.int8),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_state_dict(tmp_path / "a.pth", TENSORS)
    save_safetensors(tmp_path / "a.safetensors", open_checkpoint(tmp_path / "a.pth"), {"by": "me"})
    return tmp_path / "a.safetensors"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_table_shows_tensors_totals_and_metadata(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, str(checkpoint)).splitlines()
    assert lines[0] == f"{checkpoint}: safetensors"
    assert [line.split() for line in lines[2:6]] == [
        ["tensor", "type", "shape", "size"],
        ["model.norm.weight", "BF16", "3", "6", "B"],
        ["scale", "F32", "scalar", "4", "B"],
        ["x", "I8", "2x5", "10", "B"],
    ]
    assert lines[7:11] == [
        "I8: 1 tensor, 10 B",
        "BF16: 1 tensor, 6 B",
        "F32: 1 tensor, 4 B",
        "together: 3 tensors, 20 B",
    ]
    assert lines[12:] == ["by: me"]


def test_json_has_everything(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(printed(capsys, str(checkpoint), "--json"))
    assert content["format"] == "safetensors"
    assert content["tensors"][2] == {"name": "x", "type": "I8", "shape": [2, 5], "bytes": 10}
    assert content["totals"]["I8"] == {"tensors": 1, "bytes": 10}
    assert content["metadata"] == {"by": "me"}


@pytest.mark.parametrize("version", [1, 2])
def test_quantized_mllm_shows_its_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    entries = [block_entry("w", MllmType.Q4_K, (2, 256)), plain_entry("n", MllmType.F32, (4,))]
    with (MllmV1Writer if version == 1 else MllmV2Writer)(tmp_path / "a.mllm", entries) as writer:
        writer.write("w", torch.zeros(288, dtype=torch.uint8))
        writer.write("n", torch.zeros(4))
    content = json.loads(printed(capsys, str(tmp_path / "a.mllm"), "--json"))
    assert content["format"] == f"mllm v{version}"
    shape = [288] if version == 1 else [2, 256]
    assert content["tensors"][0] == {"name": "w", "type": "Q4_K", "shape": shape, "bytes": 288}
    assert ("shapes" in content["metadata"]) == (version == 1)


def test_rotation_shows_its_matrices_and_their_making(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eye = torch.eye(4, dtype=torch.float64)
    save_rotation(tmp_path / "r.bin", Rotation(eye, (eye[:2, :2],), metadata={"seed": 7}))
    content = json.loads(printed(capsys, str(tmp_path / "r.bin"), "--json"))
    assert content["format"] == "rotation (mllm)"
    assert [t["name"] for t in content["tensors"]] == ["R", "R_v[0]"]
    assert content["metadata"] == {"seed": 7}


def test_entries_that_are_no_tensors_are_noted(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "w": torch.ones(2)}, tmp_path / "a.pth")
    assert describe(tmp_path / "a.pth").metadata == {"entries that are no tensors": ["epoch"]}


@pytest.mark.skipif(sys.platform != "linux", reason="the interpreter is no ELF file")
def test_elf_shows_its_machine(capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(printed(capsys, sys.executable, "--json"))
    assert content["format"] == "ELF"
    expected = {"x86_64": "x86-64", "aarch64": "AArch64"}
    assert content["metadata"]["machine"] == expected.get(
        os.uname().machine, content["metadata"]["machine"]
    )


def test_lines_fit_a_window_and_names_keep_both_ends(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{'very_' * 20}deep.weight" for i in range(2)]
    save_state_dict(tmp_path / "a.pth", {name: torch.zeros(1000, 1000) for name in names})
    lines = list(inspect.table(describe(tmp_path / "a.pth"), 80))[1:]
    assert max(map(len, lines)) == 80
    shown = [line.split()[0] for line in lines if line.startswith("model")]
    assert all("…" in name and name.endswith("deep.weight") for name in shown)
    assert len(set(shown)) == 2
    whole = list(inspect.table(describe(tmp_path / "a.pth"), None))
    assert sum(any(name in line for name in names) for line in whole) == 2


def test_names_cannot_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(tmp_path / "a.pth", {"\x1b[2J\nx\u202e": torch.zeros(1)})
    assert "\\x1b[2J\\nx\\u202e" in printed(capsys, str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (7_300_000_000, "7.3 GB")],
)
def test_sizes_are_readable(nbytes: int, text: str) -> None:
    assert inspect.size(nbytes) == text


def test_unreadable_file_is_a_message_and_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert main(["inspect", str(tmp_path / "a.txt")]) == 1
    error = capsys.readouterr().err
    assert "is no checkpoint that qbuild knows" in error
    assert "Traceback" not in error


def test_golden_files_are_described(golden_folder: Path) -> None:
    read = describe(golden_folder / "mllm_qwen2_tiny" / "rot_Q6_K.mllm")
    assert {kind: count for kind, (count, _) in read.totals().items()} == {
        "Q6_K": 15,
        "Q4_0": 1,
        "F32": 11,
    }
    shown = describe(golden_folder / "mllm_qwen2_tiny" / "R.bin")
    assert [line.shape for line in shown.tensors] == [(256, 256), (64, 64), (64, 64)]


@pytest.fixture
def golden_folder() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("../shared/golden (files of the real tools, 36 MB) is not here")
    return folder


def test_file_that_is_not_there_is_a_mistake_on_the_command_line(qbuild: Qbuild) -> None:
    done = qbuild("inspect", "nosuch")
    assert (done.returncode, done.stderr) == (2, "error: there is no nosuch\n")
