"""Every family that is described: names and shapes are the real class's, a rotation changes no
output, and one layer at a time sees what the whole module sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from buildsys.models.open import Model, open_model
from buildsys.models.profile import profile
from buildsys.models.profile_layers import profile_layers
from buildsys.models.rescaling import balance_by_weights
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, make_rotations
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import Length, Sample, TextSamples
from tests import tiny_models

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "qwen2.5": lambda: tiny_models.new_decoder("Qwen2", tie_word_embeddings=True),
    "qwen2.5 with sliding windows": lambda: tiny_models.new_decoder(
        "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: tiny_models.new_decoder("Qwen3", tie_word_embeddings=True),
    "qwen3 with biases": lambda: tiny_models.new_decoder("Qwen3", attention_bias=True),
    "llama 3": lambda: tiny_models.new_decoder("Llama", rope_parameters=LLAMA3),
    "llama with all biases": lambda: tiny_models.new_decoder(
        "Llama", attention_bias=True, mlp_bias=True
    ),
    "qwen2.5-vl": tiny_models.new_qwen2_5_vl,
}


class Pictures(TextSamples):
    """Samples that know how many patches they have."""

    def lengths(self) -> list[Length]:
        return [
            Length(each.input_ids.shape[1], 0 if each.pixel_values is None else 48)
            for each in self.windows
        ]


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    return open_model(tiny_models.save_model(MAKERS[request.param](), folder))


def samples(model: Model) -> Pictures:
    """Text, and for models that see, an image of 6 x 8 patches: windows that are not all full."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (1, 40), generator=generator)
    if model.config.vision is None:
        return Pictures((Sample(ids),))
    start, end = tiny_models.FIRST_SPECIAL + 3, tiny_models.FIRST_SPECIAL + 4
    image = torch.tensor([[start, *[tiny_models.IMAGE_TOKEN] * 12, end]])
    pixels = torch.randn(48, 3 * 2 * 14 * 14, generator=generator)
    with_image = torch.cat([ids[:, :7], image, ids[:, 7:]], dim=1)
    return Pictures((Sample(with_image, pixels, torch.tensor([[1, 6, 8]])),))


def test_every_tensor_of_the_real_class_is_described(model: Model) -> None:
    module: Any = load_module(model)
    described = sum(torch.Size(shape).numel() for shape in model.family.shapes.values())
    assert described == sum(parameter.numel() for parameter in module.parameters())


def test_rotated_and_rescaled_it_computes_the_same(model: Model) -> None:
    file = make_rotations(
        model.family, method="auto", seed=0, vision=True, construction="layernorm"
    )
    rotations = fit_rotations(file, model.family)
    turned = rotated_tensors(model, rotations)
    factors = dict(balance_by_weights(model.family, turned, ["up-down"], powers_of_two=False))
    tensors = rotated_tensors(model, rotations, rescale=factors, dtype=torch.float64)
    changed = load_module(model, tensors, torch.float64)
    exact = load_module(model, dtype=torch.float64)
    for sample in samples(model).windows:
        expected, found = logits(exact, sample), logits(changed, sample)
        # transformers' RMSNorm computes in float32 whatever the model's type.
        assert (found - expected).abs().max() / expected.abs().max() <= 2e-6


def test_turned_weights_are_other_weights(model: Model) -> None:
    file = make_rotations(
        model.family, method="auto", seed=0, vision=True, construction="layernorm"
    )
    tensors = rotated_tensors(model, fit_rotations(file, model.family))
    for linear in model.family.linears.values():
        stored = model.tensors
        name = linear.weight_name
        if name in stored.names():
            assert not torch.allclose(tensors.read(name), stored.read(name)), name


def test_one_layer_at_a_time_sees_what_the_whole_sees(model: Model, tmp_path: Path) -> None:
    found = profile_layers(model, model.tensors, [samples(model)], tmp_path)
    whole = profile(model.family, load_module(model), [samples(model)])
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        for side in ("input", "output"):
            a, b = getattr(expected, side), getattr(found[name], side)
            assert (a.ori, a.std) == pytest.approx((b.ori, b.std), rel=1e-5), (name, side)


def test_checkpoint_of_awq_is_the_model_of_its_dequantized_weights(tmp_path: Path) -> None:
    """Every linear packed (32 columns to a row of words), and the float model beside it."""
    module: Any = tiny_models.new_decoder("Llama")
    folder = tiny_models.save_model(module, tmp_path / "float")
    weights = tiny_models.weights_of(folder)
    packed: dict[str, torch.Tensor] = {}
    for name, W in list(weights.items()):
        if "_proj.weight" in name:
            parts, weights[name] = packed_by_awq(W)
            packed |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        else:
            packed[name] = W
    tiny_models.rewrite(folder, weights)
    other = tiny_models.save_model(module, tmp_path / "awq")
    tiny_models.rewrite(other, packed)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (other / "config.json").write_text(json.dumps(config))
    sample = Sample(torch.arange(20)[None])
    expected = logits(load_module(open_model(folder)), sample)
    assert torch.equal(logits(load_module(open_model(other)), sample), expected)


def packed_by_awq(W: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Round to nearest in groups of 32; AWQ's three tensors, and the weight that they stand for."""
    groups = W.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(2) / 7).half()
    q = (groups / scales.float()[:, :, None]).round().clamp(-8, 7).to(torch.int32) + 8
    rounded = ((q - 8) * scales.float()[:, :, None]).flatten(1)
    zeros = torch.full_like(scales, 8, dtype=torch.int32)
    words = {"qweight": q.flatten(1), "qzeros": zeros}
    parts = {part: awq_words(each.T.contiguous()) for part, each in words.items()}
    return {**parts, "scales": scales.T.contiguous()}, rounded


def awq_words(columns: torch.Tensor) -> torch.Tensor:
    """[m, n] of 0..15 as int32 words of eight columns, in AWQ's order."""
    eight = columns.unflatten(1, (-1, 8)).long()[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    words = (eight << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
