"""The permutation from transformers' patches to the NPU compiler's image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from buildsys.models.config import VisionConfig
from buildsys.models.errors import ModelError
from buildsys.models.patch_grid import merged_image, patch_grid

QWEN2_VL = VisionConfig(32, 1280, 16, 5120, 3, 14, 2, 2)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def reference(pixel_values: np.ndarray, frames: int, rows: int, columns: int) -> np.ndarray:
    """The vendor client's permutation, as numpy writes it."""
    split = pixel_values.reshape(frames, rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    ordered = split.transpose(0, 1, 2, 7, 3, 4, 8, 6, 5)
    return ordered.reshape(frames, rows * columns // 4 * 14, 56, 6)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 4, 10), (3, 8, 2)])
def test_every_bit_is_where_the_reference_puts_it(shape: tuple[int, int, int]) -> None:
    count = shape[0] * shape[1] * shape[2]
    pixel_values = torch.randn(count, 1176, generator=torch.Generator().manual_seed(1))
    found = merged_image(pixel_values, patch_grid(shape, QWEN2_VL)).numpy()
    assert np.array_equal(found, reference(pixel_values.numpy(), *shape))


def test_the_image_of_224_pixels_has_the_compilers_shape_and_not_the_raw_order() -> None:
    pixel_values = torch.arange(256 * 1176, dtype=torch.float32).reshape(256, 1176)
    found = merged_image(pixel_values, patch_grid([1, 16, 16], QWEN2_VL))[0]
    assert tuple(found.shape) == (896, 56, 6)
    raw = pixel_values.reshape(896, 56, 6)
    assert (found == raw).float().mean() < 0.01


def test_pixels_of_a_processed_image_stand_where_the_closed_form_says() -> None:
    """out[bi*112 + bj*14 + r, mi*28 + mj*14 + q, k] is the normalised image's pixel
    [(bi*2 + mi)*14 + r, (bj*2 + mj)*14 + q, k % 3]."""
    from transformers import Qwen2VLImageProcessorPil

    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    made = Qwen2VLImageProcessorPil().preprocess([picture], do_resize=False, return_tensors="pt")
    found = merged_image(made["pixel_values"], patch_grid(made["image_grid_thw"][0], QWEN2_VL))[0]
    normalised = (picture.astype(np.float32) / 255 - MEAN) / STD
    h, w, k = np.meshgrid(np.arange(896), np.arange(56), np.arange(6), indexing="ij")
    bi, bj, r = h // 112, h % 112 // 14, h % 14
    mi, mj, q = w // 28, w % 28 // 14, w % 14
    expected = normalised[(bi * 2 + mi) * 14 + r, (bj * 2 + mj) * 14 + q, k % 3]
    assert np.abs(found.numpy() - expected).max() < 1e-6
    assert torch.equal(found[..., :3], found[..., 3:])  # a still image is two equal frames


def test_what_is_no_image_of_the_grid_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be merged"):
        patch_grid([1, 15, 16], QWEN2_VL)
    with pytest.raises(ModelError, match=r"its grid promises \[256, 1176\]"):
        merged_image(torch.zeros(255, 1176), patch_grid([1, 16, 16], QWEN2_VL))
