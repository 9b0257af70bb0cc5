"""Qwen2-VL's image patches, as transformers orders them and as Mobilint's compiler wants them.

transformers' processor gives one row per patch: rows ordered (frame group, block row, block
column, row in block, column in block), where a block is the merge x merge patches that become
one token; columns ordered (channel, frame, row in patch, column in patch). Mobilint's vision
encoder reads one image of frames * channels planes per frame group instead: [blocks * patch,
merge * merge * patch, frames * channels]. Blocks lie below one another, the patches of a block
side by side, and planes are ordered (frame, channel). Both hold the same numbers.
Source: `_preprocess_image_tokens` of the package transformers-mblt, and the shape [896, 56, 6]
of the vendor's calibration files. The vendor's first calibration scripts (compilers before 1.1)
wrote the rows as they lay, without this permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from buildsys.models.config import VisionConfig
from buildsys.models.errors import ModelError


@dataclass(frozen=True)
class PatchGrid:
    """One image's grid: frame groups, and patches down and across."""

    frames: int
    rows: int
    columns: int
    vision: VisionConfig

    @property
    def planes(self) -> int:
        """Planes of the compiler's image: frames of a group x channels."""
        return self.vision.temporal_patch_size * self.vision.in_channels

    @property
    def blocks(self) -> int:
        """Merged tokens of one frame group."""
        return (self.rows * self.columns) // self.vision.spatial_merge_size**2

    @property
    def height(self) -> int:
        """Height of the compiler's image."""
        return self.blocks * self.vision.patch_size

    @property
    def width(self) -> int:
        """Width of the compiler's image."""
        return self.vision.spatial_merge_size**2 * self.vision.patch_size


def patch_grid(grid_thw: Tensor | Sequence[int], vision: VisionConfig) -> PatchGrid:
    """The grid of one image. Raises ModelError for one that the merge size does not divide."""
    frames, rows, columns = (int(n) for n in grid_thw)
    merge = vision.spatial_merge_size
    if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
        message = f"a grid of {[frames, rows, columns]} patches cannot be merged {merge} x {merge}"
        raise ModelError(message, field="image_grid_thw")
    return PatchGrid(frames, rows, columns, vision)


def merged_image(pixel_values: Tensor, grid: PatchGrid) -> Tensor:
    """[frames, height, width, planes] of the compiler, from pixel_values [patches, features]."""
    vision = grid.vision
    merge, patch = vision.spatial_merge_size, vision.patch_size
    expected = (grid.frames * grid.rows * grid.columns, grid.planes * patch * patch)
    if tuple(pixel_values.shape) != expected:
        message = f"has shape {list(pixel_values.shape)}, its grid promises {list(expected)}"
        raise ModelError(message, field="pixel_values")
    split = pixel_values.reshape(
        grid.frames,
        grid.rows // merge,
        grid.columns // merge,
        merge,
        merge,
        vision.in_channels,
        vision.temporal_patch_size,
        patch,
        patch,
    )
    # (f, block row, block column, mi, mj, c, t, r, q) -> (f, bi, bj, r, mi, mj, q, t, c).
    ordered = split.permute(0, 1, 2, 7, 3, 4, 8, 6, 5)
    return ordered.reshape(grid.frames, grid.height, grid.width, grid.planes)
