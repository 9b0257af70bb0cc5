"""One door to all checkpoints: told by content, whole in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from buildsys.formats.checkpoint import check_finite, open_checkpoint
from buildsys.formats.errors import FormatError
from buildsys.formats.mllm_v1 import save_mllm_v1
from buildsys.formats.mllm_v2 import save_mllm_v2
from buildsys.formats.safetensors_file import save_safetensors
from buildsys.formats.torch_archive import save_state_dict

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int32)}


def save_pth(path: Path) -> None:
    save_state_dict(path, TENSORS)


def save_others(save: Callable[..., None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_pth(path.with_name("origin.pth"))
        save(path, open_checkpoint(path.with_name("origin.pth")))
        path.with_name("origin.pth").unlink()

    return write


WRITERS = {
    "m.safetensors": save_others(save_safetensors),
    "m.pth": save_pth,
    "m.bin": save_pth,
    "v1.mllm": save_others(save_mllm_v1),
    "v2.mllm": save_others(save_mllm_v2),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_every_format_is_opened(tmp_path: Path, name: str, whole_folder: bool) -> None:
    WRITERS[name](tmp_path / name)
    source = open_checkpoint(tmp_path if whole_folder else tmp_path / name, {"a": (2, 3)})
    assert list(source.names()) == ["a", "b"]
    for key, tensor in TENSORS.items():
        assert torch.equal(source.read(key).reshape(tensor.shape), tensor)
        assert source.nbytes(key) == tensor.nbytes
    assert source.rows("b", 1, 4).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "v1.mllm", "v2.mllm"])
def test_content_counts_before_the_name(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    (tmp_path / name).rename(tmp_path / "model.dat")
    assert list(open_checkpoint(tmp_path / "model.dat").names()) == ["a", "b"]


def shards(folder: Path, kind: str) -> Path:
    """Two shards and their index, as transformers lays them out."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        file = f"{stem}-{number:05}-of-00002.{kind}"
        if kind == "safetensors":
            safetensors.torch.save_file({name: tensor}, folder / file)
        else:
            torch.save({name: tensor}, folder / file)
        weight_map[name] = file
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_one_checkpoint(tmp_path: Path, kind: str) -> None:
    index = shards(tmp_path, kind)
    for place in (index, tmp_path):
        source = open_checkpoint(place)
        assert list(source.names()) == ["a", "b"]
        assert torch.equal(source.read("a"), TENSORS["a"])
        assert torch.equal(source.rows("b", 2, 9), TENSORS["b"][2:])
        assert (source.shape("a"), source.dtype("b")) == ((2, 3), torch.int32)
        source.release("a")
        assert torch.equal(source.read("a"), TENSORS["a"])
    assert source.metadata == {"total_size": 44}


def test_shards_without_an_index_are_joined(tmp_path: Path) -> None:
    shards(tmp_path, "safetensors").unlink()
    assert list(open_checkpoint(tmp_path).names()) == ["a", "b"]
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model-00003.safetensors")
    with pytest.raises(FormatError, match=r"'a': is also in model-00001-of-00002\.safetensors"):
        open_checkpoint(tmp_path)


def test_index_and_shards_of_different_versions_are_told(tmp_path: Path) -> None:
    index = shards(tmp_path, "safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"'c': .*says that it is here, and it is not"):
        open_checkpoint(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path, "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    told = r"model-00002-of-00002\.safetensors: error: does not exist, and .*names it\n.*incomplete"
    with pytest.raises(FormatError, match=told):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "", "x/../../y", 3])
def test_index_may_not_point_outside_its_folder(tmp_path: Path, file: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(FormatError, match="not a file below this folder"):
        open_checkpoint(index)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": []}', "{}"])
def test_broken_index_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"is not JSON|weight_map.*missing or empty"):
        open_checkpoint(tmp_path)


def test_unknown_file_lists_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for place in (tmp_path / "notes.txt", tmp_path, tmp_path / "nothing"):
        with pytest.raises(FormatError, match=r"\.mllm \(v1, v2\), \.gguf, an index"):
            open_checkpoint(place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_counted_and_named(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    check_finite("w", tensor)
    tensor[0, 1] = tensor[2, 2] = float("nan")
    tensor[1, 1] = float("-inf")
    with pytest.raises(FormatError, match="'w': holds 2 NaN and 1 infinite values among 15"):
        check_finite("w", tensor)


def test_integers_and_empty_tensors_are_finite() -> None:
    check_finite("w", torch.zeros(3, dtype=torch.int8))
    check_finite("w", torch.empty(0))
