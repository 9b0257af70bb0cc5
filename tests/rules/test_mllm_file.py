"""The promises of rule `mllm-file`: mllm's bytes, from any checkpoint, of either version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from buildsys.errors import StepError
from buildsys.formats.checkpoint import open_checkpoint
from tests import tiny_models


def test_int8_export_becomes_mllms_own_bytes(make: Callable[..., Any], golden: Path):
    folder = golden / "mllm_qwen2_tiny"
    made = make("mllm-file", "int8.mllm", {"checkpoint": folder / "int8.pth"})
    assert made.out.read_bytes() == (folder / "int8.mllm").read_bytes()
    assert made.notes["types"] == {"F32": 57, "I8": 14 + 2 * 15}  # weights; clip flags
    assert made.notes["tensors"] == 7 + 47 * 2  # what mllm's export makes of two layers
    assert made.progress[-1] == (101, 101, "tensors")


def test_version_2_keeps_dtypes_and_shapes(make: Callable[..., Any], tmp_path: Path):
    tensors = {
        "a.weight": torch.randn(3, 4).bfloat16(),
        "b.bias": torch.tensor([-7, 70000], dtype=torch.int32),
        "c.scale": torch.tensor(0.5),
    }
    save_file(tensors, tmp_path / "c.safetensors")
    made = make("mllm-file", "c.mllm", {"checkpoint": tmp_path / "c.safetensors"}, {"version": 2})
    read = open_checkpoint(made.out)
    for name, tensor in tensors.items():
        assert torch.equal(read.read(name), tensor), name
        assert read.dtype(name) == tensor.dtype


@pytest.mark.parametrize("version", [1, 2])
def test_int32_stays_int32(make: Callable[..., Any], tmp_path: Path, version: int):
    bias = torch.tensor([-127, 3, 2**30], dtype=torch.int32)
    torch.save({"q.bias": bias}, tmp_path / "c.pth")
    made = make("mllm-file", "c.mllm", {"checkpoint": tmp_path / "c.pth"}, {"version": version})
    read = open_checkpoint(made.out)
    assert read.stored_type("q.bias") == "I32"
    assert torch.equal(read.read("q.bias"), bias)


def test_float64_that_loses_digits_is_said(make: Callable[..., Any], tmp_path: Path):
    save_file({"w": torch.ones(2, dtype=torch.float64)}, tmp_path / "c.safetensors")
    made = make("mllm-file", "c.mllm", {"checkpoint": tmp_path / "c.safetensors"})
    assert made.notes["narrowed"] == ["w"]
    assert made.warnings == ["1 float64 tensors became float32, such as w"]


def test_v1_becomes_v2_with_the_shapes_of_the_model(make: Callable[..., Any], golden: Path):
    folder = golden / "mllm_qwen2_tiny"
    v1 = {"checkpoint": folder / "int8.mllm"}
    with pytest.raises(StepError, match="no shapes"):
        make("mllm-file", "v2.mllm", v1, {"version": 2})
    made = make("mllm-file", "v2.mllm", {**v1, "model": folder}, {"version": 2})
    read, pth = open_checkpoint(made.out), open_checkpoint(folder / "int8.pth")
    assert sorted(read.names()) == sorted(pth.names())
    for name in pth.names():
        stored = pth.read(name)
        stored = stored.to(torch.int8) if stored.dtype == torch.bool else stored
        assert torch.equal(read.read(name), stored), name


def test_names_are_the_classic_ones_that_the_runtime_knows(
    make: Callable[..., Any], qwen2vl_folder: Path, tmp_path: Path
):
    folder = tiny_models.transformers_keys(qwen2vl_folder, tmp_path / "new")
    old = make("mllm-file", "c.mllm", {"checkpoint": qwen2vl_folder}).out
    new = make("mllm-file", "c.mllm", {"checkpoint": folder}).out
    names = set(open_checkpoint(new).names())
    assert names == set(open_checkpoint(old).names())
    assert {"model.norm.weight", "visual.merger.mlp.0.weight"} <= names
