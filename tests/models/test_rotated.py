"""Fusion, rotation and rescaling change every weight and no output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from buildsys.formats.tensors import TensorSource
from buildsys.models import rotated
from buildsys.models.errors import ModelError
from buildsys.models.family import Linear
from buildsys.models.open import Model, open_model
from buildsys.models.rescaling import balance_by_weights
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import Rotations, fit_rotations, load_rotations, make_rotations
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import Sample
from buildsys.models.transform import Transform
from tests import tiny_models

# Of the largest logit. transformers' RMSNorm computes in float32 whatever the model's type.
FLOAT64_LIMIT = 2e-6


@pytest.fixture(scope="module")
def text_sample() -> Sample:
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    return Sample(ids)


@pytest.fixture(scope="module")
def image_sample(text_sample: Sample) -> Sample:
    """6 image tokens of a 4 x 6 grid between text."""
    image = torch.full((1, 6), tiny_models.IMAGE_TOKEN)
    ids = torch.cat([text_sample.input_ids[:, :7], image, text_sample.input_ids[:, 7:]], dim=1)
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    return Sample(ids, pixels, torch.tensor([[1, 4, 6]]))


def test_rotated_checkpoint_of_the_real_tool_is_reproduced(golden_folder: Path) -> None:
    model = open_model(golden_folder / "mllm_qwen2vl_tiny")
    rotations = load_rotations(model.folder / "rotation.bin", model.family)
    expected = load_file(model.folder / "rotated.safetensors")
    tensors = rotated_tensors(model, rotations)
    assert set(tensors.names()) == set(expected)
    for name, tensor in expected.items():
        # The real tool multiplies by dense matrices: its sums round differently in float64.
        torch.testing.assert_close(tensors.read(name), tensor, rtol=0, atol=1e-11)


def test_one_pass_in_float64_agrees_with_the_real_tool_to_float32(golden_folder: Path) -> None:
    model = open_model(golden_folder / "mllm_qwen2vl_tiny")
    rotations = load_rotations(model.folder / "rotation.bin", model.family)
    expected = load_file(model.folder / "rotated.safetensors")
    tensors = rotated_tensors(model, rotations, parity=False)
    for name, tensor in expected.items():
        error = (tensors.read(name) - tensor).abs().max() / tensor.abs().max()
        assert error <= 2e-7, name


@pytest.mark.parametrize("method", ["hadamard", "kronecker", "identity"])
def test_a_rotated_qwen2_computes_the_same(
    qwen2_folder: Path, text_sample: Sample, method: str
) -> None:
    model = open_model(qwen2_folder)
    _assert_same_function(model, _made(model, method), text_sample)


@pytest.mark.parametrize("construction", ["layernorm", "mllm"])
@pytest.mark.parametrize("method", ["hadamard", "kronecker", "identity"])
def test_a_rotated_qwen2vl_computes_the_same(
    qwen2vl_folder: Path, image_sample: Sample, method: str, construction: str
) -> None:
    model = open_model(qwen2vl_folder)
    rotations = _made(model, method, construction)
    _assert_same_function(model, rotations, image_sample)
    biases = [n for n in rotated_tensors(model, rotations).names() if n.endswith("norm1.bias")]
    assert len(biases) == (2 if construction == "layernorm" else 0)


def test_rotating_the_language_model_alone_computes_the_same(
    qwen2vl_folder: Path, image_sample: Sample
) -> None:
    model = open_model(qwen2vl_folder)
    file = make_rotations(
        model.family, method="hadamard", seed=0, vision=False, construction="layernorm"
    )
    rotations = fit_rotations(file, model.family)
    _assert_same_function(model, rotations, image_sample)
    tensors, qkv = rotated_tensors(model, rotations), "visual.blocks.0.attn.qkv.weight"
    assert torch.equal(tensors.read(qkv), model.tensors.read(qkv))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"hidden_size": 88, "num_attention_heads": 11, "num_key_value_heads": 1},
    ],
    ids=["no-gqa", "one-kv-head", "tied", "no-hadamard-size"],
)
def test_every_shape_of_attention_survives(
    tmp_path: Path, text_sample: Sample, changes: dict[str, object]
) -> None:
    model = open_model(tiny_models.save_model(tiny_models.new_qwen2(**changes), tmp_path))
    _assert_same_function(model, _made(model, "auto"), text_sample)


def test_folding_the_norms_alone_computes_the_same(
    qwen2vl_folder: Path, image_sample: Sample
) -> None:
    model = open_model(qwen2vl_folder)
    tensors = rotated_tensors(model, fuse=True, dtype=torch.float64)
    assert bool((tensors.read("model.norm.weight") == 1).all())
    assert bool((tensors.read("visual.blocks.1.norm2.bias") == 0).all())
    before = logits(load_module(model, dtype=torch.float64), image_sample)
    after = logits(load_module(model, tensors, torch.float64), image_sample)
    assert _difference(before, after) <= FLOAT64_LIMIT


def test_without_rotation_tensors_are_the_models_own_with_the_head_apart(
    qwen2vl_folder: Path,
) -> None:
    model = open_model(qwen2vl_folder)
    tensors = rotated_tensors(model)
    assert set(tensors.names()) == {*model.tensors.names(), "lm_head.weight"}
    assert all(torch.equal(tensors.read(n), model.tensors.read(n)) for n in model.tensors.names())
    head, embedding = tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")
    assert torch.equal(head, embedding)


def test_rescaling_by_powers_of_two_changes_no_bit_of_the_output(
    qwen2_folder: Path, text_sample: Sample
) -> None:
    model = open_model(qwen2_folder)
    rotations = _made(model, "hadamard")
    plain = rotated_tensors(model, rotations)
    factors = dict(balance_by_weights(model.family, plain, ["up-down"], powers_of_two=True))
    assert any(bool((s != 1).any()) for s in factors.values())
    rescaled = rotated_tensors(model, rotations, rescale=factors)
    before = logits(load_module(model, plain), text_sample)
    assert torch.equal(before, logits(load_module(model, rescaled), text_sample))


def test_rescaling_reaches_up_and_down_only(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    s = torch.full((96,), 2.0, dtype=torch.float64)
    tensors = rotated_tensors(model, rescale={"model.layers.1.mlp.down_proj": s})
    changed = {
        name
        for name in tensors.names()
        if not torch.equal(tensors.read(name), model.tensors.read(name))
    }
    up, down = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("up", "down"))
    assert changed == {up, down}
    assert torch.equal(tensors.read(up) * 2, model.tensors.read(up))
    assert torch.equal(tensors.read(down), model.tensors.read(down) * 2)


def test_factors_of_another_model_are_refused(qwen2_folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ModelError, match=f"'{name}'"):
        rotated_tensors(open_model(qwen2_folder), rescale={name: torch.ones(95)})


def test_a_rotation_of_another_model_is_refused_by_its_matrix(
    qwen2_folder: Path, qwen2vl_folder: Path, tmp_path: Path
) -> None:
    text, vision = open_model(qwen2_folder), open_model(qwen2vl_folder)
    file = make_rotations(
        vision.family, method="hadamard", seed=0, vision=True, construction="layernorm"
    )
    with pytest.raises(ModelError, match="'R_vit': acts on nothing in a qwen2"):
        fit_rotations(file, text.family)
    deeper = tiny_models.new_qwen2(num_hidden_layers=3)
    other = open_model(tiny_models.save_model(deeper, tmp_path)).family
    with pytest.raises(ModelError, match="'R_v': 2 matrices of size 16, the model needs 3 of 16"):
        fit_rotations(_file(text), other)


@pytest.mark.parametrize("construction", ["layernorm", "mllm"])
def test_any_run_of_rows_is_what_the_whole_tensor_has_there(
    qwen2vl_folder: Path, construction: str
) -> None:
    model = open_model(qwen2vl_folder)
    rotations = _made(model, "hadamard", construction)
    whole, parts = rotated_tensors(model, rotations), rotated_tensors(model, rotations)
    for name in whole.names():
        rows = whole.shape(name)[0]
        cut = [parts.rows(name, a, min(a + 29, rows)) for a in range(0, rows, 29)]
        torch.testing.assert_close(torch.cat(cut), whole.read(name), rtol=0, atol=1e-7)
        parts.release(name)


def test_a_tensor_over_a_file_has_the_same_values(
    qwen2vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(qwen2vl_folder)
    rotations = _made(model)
    expected = {name: t.clone() for name, t in _tensors(rotated_tensors(model, rotations))}
    monkeypatch.setattr(rotated, "LARGEST_IN_MEMORY", 0)
    found = dict(_tensors(rotated_tensors(model, rotations)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_side_of_a_weight_is_turned_whole(
    qwen2vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that both sides of change: its float64 copies would be larger than all else."""
    model = open_model(qwen2vl_folder)
    rotations = _made(model)
    monkeypatch.setattr(rotated, "PART", 1 << 10)
    sizes: list[int] = []
    for side in (Transform.input_side, Transform.output_side):

        def watched(self: Transform, linear: Linear, W: Tensor, side: Any = side) -> Tensor:
            sizes.append(W.numel())
            return side(self, linear, W)

        monkeypatch.setattr(Transform, side.__name__, watched)
    tensors = rotated_tensors(model, rotations)
    for name in tensors.names():
        tensors.read(name)
    longest = max(max(shape[0], math.prod(shape[1:])) for shape in model.family.shapes.values())
    assert sizes
    assert max(sizes) <= max(rotated.PART, longest)


def test_sixteen_bit_shards_give_the_tensors_of_one_file(
    qwen2vl_folder: Path, tmp_path: Path
) -> None:
    whole = tiny_models.classic_folder(qwen2vl_folder, tmp_path / "whole", torch.bfloat16)
    from transformers import Qwen2VLForConditionalGeneration

    module = Qwen2VLForConditionalGeneration.from_pretrained(whole, dtype=torch.bfloat16)
    sharded = tiny_models.save_model(module, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = open_model(whole), open_model(sharded)
    a, b = rotated_tensors(one, _made(one)), rotated_tensors(many, _made(many))
    assert list(a.names()) == list(b.names())
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.names())


def _tensors(source: TensorSource) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, source.read(name)) for name in source.names())


def _file(model: Model, method: str = "hadamard", construction: str = "layernorm"):
    return make_rotations(
        model.family, method=method, seed=3, vision=True, construction=construction
    )


def _made(model: Model, method: str = "hadamard", construction: str = "layernorm") -> Rotations:
    return fit_rotations(_file(model, method, construction), model.family)


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def _assert_same_function(model: Model, rotations: Rotations, sample: Sample) -> None:
    exact = logits(load_module(model, dtype=torch.float64), sample)
    wide = rotated_tensors(model, rotations, dtype=torch.float64)
    assert (
        _difference(exact, logits(load_module(model, wide, torch.float64), sample)) <= FLOAT64_LIMIT
    )
    own_error = _difference(exact, logits(load_module(model), sample).double())
    stored = rotated_tensors(model, rotations)
    error = _difference(exact, logits(load_module(model, stored), sample).double())
    assert error <= 3 * own_error
