"""transformers' module, filled from any source of tensors, computes what it always did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from buildsys.formats.tensors import RenamedSource
from buildsys.models.errors import ModelError
from buildsys.models.open import open_model
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, make_rotations
from buildsys.models.runtime import hidden_states, load_module, logits, position_ids
from buildsys.models.samples import Sample
from tests import tiny_models

GRID = torch.tensor([[1, 4, 6]])


def test_logits_of_transformers_4_are_reproduced(golden_folder: Path) -> None:
    model = open_model(golden_folder / "mllm_qwen2vl_tiny")
    given = load_file(model.folder / "io.safetensors")
    sample = Sample(given["input_ids"], given["pixel_values"], given["image_grid_thw"])
    found = logits(load_module(model), sample)
    torch.testing.assert_close(found, given["logits"][0], rtol=0, atol=5e-6)


def test_rotated_logits_of_transformers_4_are_reproduced(golden_folder: Path) -> None:
    from buildsys.models.rotations import load_rotations

    model = open_model(golden_folder / "mllm_qwen2vl_tiny")
    rotations = load_rotations(model.folder / "rotation.bin", model.family)
    given = load_file(model.folder / "io.safetensors")
    sample = Sample(given["input_ids"], given["pixel_values"], given["image_grid_thw"])
    found = logits(load_module(model, rotated_tensors(model, rotations)), sample)
    torch.testing.assert_close(found, given["logits"][0], rtol=0, atol=5e-6)


def test_the_module_is_the_one_that_transformers_loads(qwen2vl_folder: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    theirs = Qwen2VLForConditionalGeneration.from_pretrained(qwen2vl_folder)
    ours = load_module(open_model(qwen2vl_folder))
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    buffers = dict(ours.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in theirs.named_buffers())


def test_the_hubs_flat_layout_computes_the_same(qwen2vl_folder: Path, tmp_path: Path) -> None:
    nested = open_model(qwen2vl_folder)
    flat = open_model(tiny_models.classic_folder(qwen2vl_folder, tmp_path / "classic"))
    expected = logits(load_module(nested), _with_image())
    assert torch.equal(logits(load_module(flat), _with_image()), expected)


def test_text_after_an_image_is_not_moved_by_it(qwen2vl_folder: Path) -> None:
    module = load_module(open_model(qwen2vl_folder))
    text = Sample(torch.arange(20)[None])
    alone = logits(module, text)
    logits(module, _with_image())
    assert torch.equal(logits(module, text), alone)


def test_image_positions_follow_the_grid(qwen2vl_folder: Path) -> None:
    positions = position_ids(load_module(open_model(qwen2vl_folder)), _with_image())
    # 3 text tokens, 2 x 3 merged patches, 4 text tokens after the longer side of the image.
    time = [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9]
    height = [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9]
    width = [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9]
    assert positions[:, 0].tolist() == [time, height, width]


def test_a_vision_tower_without_norm_biases_runs_under_rmsnorm(qwen2vl_folder: Path) -> None:
    model = open_model(qwen2vl_folder)
    file = make_rotations(
        model.family, method="hadamard", seed=0, vision=True, construction="layernorm"
    )
    rotations = fit_rotations(file, model.family)
    tensors = rotated_tensors(model, rotations, dtype=torch.float64)
    norms = [f"{norm.name}.bias" for norm in model.family.norms.values() if norm.bias]
    kept = {name: name for name in tensors.names() if name not in norms}
    under_rms = load_module(model, RenamedSource(tensors, kept), torch.float64)
    assert isinstance(under_rms.get_submodule("model.visual.blocks.0.norm1"), torch.nn.RMSNorm)
    expected = logits(load_module(model, dtype=torch.float64), _with_image())
    found = logits(under_rms, _with_image())
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_hidden_states_are_what_the_head_reads(qwen2_folder: Path) -> None:
    module = load_module(open_model(qwen2_folder))
    sample = Sample(torch.arange(30)[None])
    head = module.get_submodule("lm_head")
    assert torch.equal(head(hidden_states(module, sample)), logits(module, sample))


def test_a_missing_tensor_is_named(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    kept = {n: n for n in model.tensors.names() if n != "model.norm.weight"}
    with pytest.raises(ModelError, match=r"'model\.norm\.weight': is missing"):
        load_module(model, RenamedSource(model.tensors, kept))


def _with_image() -> Sample:
    image = [tiny_models.IMAGE_TOKEN] * 6
    ids = torch.tensor([[1, 2, 3, *image, 4, 5, 6, 7]])
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    return Sample(ids, pixels, GRID)
