"""Samples for profiling and evaluation: windows of text, and images with prompt and answer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One forward pass: batch 1, no padding.

    input_ids: int64 [1, n]. pixel_values [patches, features] and image_grid_thw [images, 3]
        for a sample with images. answer: which positions of input_ids are the given answer
        (None for plain text). origin: where it is from, for messages.
    """

    input_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    answer: slice | None = None
    origin: str = ""
