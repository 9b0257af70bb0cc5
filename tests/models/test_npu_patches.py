"""Patches for NPUs compute what transformers' modules compute, on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from buildsys.models.image_samples import image_samples
from buildsys.models.npu_language import CachedRotary, LastQueryLayer, NpuLanguage
from buildsys.models.npu_vision import NpuVision, cached_vision_rope, conv2d_of, split_qkv
from buildsys.models.open import Model, open_model
from buildsys.models.patch_grid import PatchGrid, merged_image, patch_grid
from buildsys.models.runtime import load_module, model_inputs
from buildsys.models.samples import Sample

GRID = (1, 4, 6)


@pytest.fixture(scope="module")
def model(qwen2vl_folder: Path) -> Model:
    return open_model(qwen2vl_folder)


@pytest.fixture(scope="module")
def module(model: Model) -> Any:
    """In float64, where what differs is the formula and not the rounding."""
    return load_module(model, dtype=torch.float64)


@pytest.fixture(scope="module")
def sample(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return next(iter(image_samples(model, folder)))


@pytest.fixture
def grid(model: Model) -> PatchGrid:
    assert model.config.vision is not None
    return patch_grid(GRID, model.config.vision)


@torch.inference_mode()
def test_a_conv3d_over_frames_is_a_conv2d_over_planes_of_the_merged_image(
    module: Any, grid: PatchGrid
) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(24, 1176, generator=generator, dtype=torch.float64)
    expected = module.model.visual.patch_embed(patches)
    image = merged_image(patches, grid).permute(0, 3, 1, 2)
    found = conv2d_of(module.model.visual.patch_embed.proj)(image)
    assert found.shape == (1, 80, grid.blocks, 4)
    assert (found.flatten(2)[0].T - expected).abs().max() < 1e-12


@torch.inference_mode()
def test_split_qkv_gives_what_the_joint_linear_gives(module: Any) -> None:
    tokens = torch.randn(5, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint: nn.Linear = module.model.visual.blocks[0].attn.qkv
    apart = torch.cat([part(tokens) for part in split_qkv(joint)], dim=-1)
    assert (apart - joint(tokens)).abs().max() < 1e-13


@torch.inference_mode()
def test_cached_vision_rope_is_bit_equal(module: Any, grid: PatchGrid) -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl as reference

    visual = module.model.visual
    positions = reference.get_vision_position_ids(torch.tensor([GRID]), 2, kwargs={})
    expected = visual.rotary_pos_emb(torch.zeros(1), positions)
    for found, its in zip(cached_vision_rope(visual, grid), expected, strict=True):
        assert torch.equal(found, its)


@torch.inference_mode()
def test_the_whole_vision_encoder_is_equal(module: Any, grid: PatchGrid, sample: Sample) -> None:
    assert sample.pixel_values is not None
    patches = sample.pixel_values.double()
    expected = module.model.visual(patches, grid_thw=torch.tensor([GRID])).pooler_output
    image = merged_image(patches, grid).permute(0, 3, 1, 2)
    found = NpuVision(module.model.visual, grid)(image)
    assert found.shape == expected.shape == (6, 64)
    # transformers turns q and k in float32 whatever the model's type is.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_cached_rope_is_bit_equal_for_any_positions(module: Any) -> None:
    rotary = module.model.language_model.rotary_emb
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 500, (3, 1, 40), generator=generator)
    hidden = torch.zeros(1, 40, 64)
    found = CachedRotary(rotary, positions=512)(hidden, positions)
    for mine, its in zip(found, rotary(hidden, positions), strict=True):
        assert torch.equal(mine, its)


@torch.inference_mode()
def test_the_last_query_alone_gives_the_last_tokens_output(module: Any) -> None:
    text = module.model.language_model
    hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turns = text.rotary_emb(hidden, torch.arange(9).expand(3, 1, 9))
    expected = text.layers[-1](hidden, attention_mask=None, position_embeddings=turns)
    found = LastQueryLayer(text.layers[-1])(hidden, *turns)
    assert found.shape == (1, 1, 64)
    assert (found[:, -1] - expected[:, -1]).abs().max() < 1e-12


@torch.inference_mode()
def test_the_whole_language_model_gives_the_last_tokens_logits(module: Any, sample: Sample) -> None:
    inputs = model_inputs(module, sample)
    assert sample.pixel_values is not None
    inputs["pixel_values"] = sample.pixel_values.double()
    captured: list[torch.Tensor] = []
    hook = module.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    expected = module(**inputs).logits[:, -1:]
    hook.remove()
    found = NpuLanguage(module, positions=512)(captured[0], inputs["position_ids"])
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
