"""Checkpoints of every type are opened as the weights that their runtime computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from buildsys.formats.mllm_types import MllmType, block_entry, plain_entry
from buildsys.formats.mllm_v1 import MllmV1Writer, save_mllm_v1
from buildsys.formats.mllm_v2 import MllmV2Writer
from buildsys.formats.torch_file import TorchFileSource
from buildsys.models.errors import ModelError
from buildsys.models.open import Model, open_model
from buildsys.models.variant import open_variant
from buildsys.quant.ggml_blocks import dequantize, quantize

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model(qwen2_folder: Path) -> Model:
    return open_model(qwen2_folder)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: model.tensors.read(name).clone() for name in model.tensors.names()}


def test_float_checkpoints_are_read_as_they_are(model: Model, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in weights(model).items()}
    save_file(half, tmp_path / "half.safetensors")
    variant = open_variant(tmp_path / "half.safetensors", model.family)
    for name, tensor in half.items():
        assert torch.equal(variant.tensors.read(name), tensor.float())
    assert variant.ranges == {}
    assert set(variant.types()) == {"BF16"}
    assert variant.bits_per_weight() == 16


def test_int8_is_the_same_from_pth_and_from_mllm(model: Model, tmp_path: Path) -> None:
    state = weights(model)
    W = state[f"{UP}.weight"]
    scale = W.abs().max() / 127
    state[f"{UP}.weight"] = torch.round(W / scale).to(torch.int8).T.contiguous()
    state[f"{UP}.weight.scale"] = scale
    for side in ("input", "output"):
        state[f"{UP}.{side}_scale"] = torch.tensor(2.5)
        state[f"{UP}.clip_{side}"] = torch.tensor(side == "input")
    torch.save(state, tmp_path / "int8.pth")
    save_mllm_v1(tmp_path / "int8.mllm", TorchFileSource(tmp_path / "int8.pth"))
    for name in ("int8.pth", "int8.mllm"):
        variant = open_variant(tmp_path / name, model.family)
        found = variant.tensors.read(f"{UP}.weight")
        expected = torch.round(W / scale) * scale
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
        for other in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(variant.tensors.read(other), state[other])
        assert list(variant.ranges) == [UP]
        ranges = variant.ranges[UP]
        assert (ranges.input, ranges.output) == (2.5, 2.5)
        assert (ranges.clip_input, ranges.clip_output) == (True, False)
        assert variant.types() == {"F32": 15, "I8": 1}


@pytest.mark.parametrize("version", [1, 2])
def test_blocks_are_dequantized_and_counted(model: Model, tmp_path: Path, version: int) -> None:
    entries, payloads = [], []
    for name, tensor in weights(model).items():
        if name == f"{UP}.weight":
            entries.append(block_entry(name, MllmType.Q8_0, tuple(tensor.shape)))
            payloads.append(torch.from_numpy(quantize(tensor.numpy(), "Q8_0").reshape(-1)))
        else:
            entries.append(plain_entry(name, MllmType.F32, tuple(tensor.shape)))
            payloads.append(tensor)
    writer = (MllmV1Writer if version == 1 else MllmV2Writer)(tmp_path / "q.mllm", entries)
    with writer:
        for entry, payload in zip(entries, payloads, strict=True):
            writer.write(entry.name, payload)
    variant = open_variant(tmp_path / "q.mllm", model.family)
    W = weights(model)[f"{UP}.weight"]
    expected = dequantize(quantize(W.numpy(), "Q8_0"), "Q8_0").reshape(W.shape)
    assert torch.equal(variant.tensors.read(f"{UP}.weight"), torch.from_numpy(expected))
    assert variant.types() == {"F32": 15, "Q8_0": 1}
    numbers = sum(t.numel() for t in weights(model).values() if t.ndim > 1)
    bits = 32 * (numbers - W.numel()) + 8.5 * W.numel()
    assert variant.bits_per_weight() == pytest.approx(bits / numbers)


def test_a_checkpoint_of_another_model_is_refused_by_tensor(model: Model, tmp_path: Path) -> None:
    state = weights(model)
    state[f"{UP}.weight"] = state[f"{UP}.weight"][:, :-1].contiguous()
    save_file(state, tmp_path / "c.safetensors")
    with pytest.raises(ModelError, match=rf"{UP}.weight.*the model needs \[96, 64\]"):
        open_variant(tmp_path / "c.safetensors", model.family)
    state[f"{UP}.weight"] = torch.ones(96, 64, dtype=torch.int64)
    save_file(state, tmp_path / "d.safetensors")
    with pytest.raises(ModelError, match="I64, which cannot be evaluated"):
        open_variant(tmp_path / "d.safetensors", model.family)
