"""What a graph gets besides the hidden state: angles of the rotary embeddings, and who sees whom.

Source: transformers' Qwen2-VL (mrope sections; the vision tower's positions lie in the order of
the merger's blocks, and images and frames do not see each other).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from buildsys.models.errors import ModelError

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig

KNOWN_TYPES = ("default", "mrope")
VISION_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """A rotary embedding. frequencies: of the first half of a head, float32 as transformers
    computes them. axes: per frequency, which of the positions (time, height, width) it turns by.
    """

    frequencies: tuple[float, ...]
    axes: tuple[int, ...]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, frequencies] for positions [axes, n]."""
        chosen = positions[torch.tensor(self.axes)].T.float()
        turned = chosen * torch.tensor(self.frequencies)
        return turned.cos(), turned.sin()


def language_rope(config: ModelConfig) -> Rope:
    """The language model's. Raises ModelError for a kind of RoPE that graphs do not have."""
    nested = config.raw.get("text_config")
    text: dict[str, Any] = {**config.raw, **(nested if isinstance(nested, dict) else {})}
    told = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = told.get("rope_type", told.get("type", "default"))
    if told.get("type") == "mrope":  # files of transformers 4 have "default" beside it
        kind = "mrope"
    if kind not in KNOWN_TYPES:
        raise ModelError(
            f"{kind!r} is not supported in a graph", file=config.file, field="rope_type"
        )
    theta = float(told.get("rope_theta") or text.get("rope_theta") or 10000.0)
    sections = told.get("mrope_section") or [config.head_dim // 2]
    axes = tuple(axis % 3 for axis, count in enumerate(sections) for _ in range(count))
    return Rope(_frequencies(config.head_dim, theta), axes)


def vision_rope(config: ModelConfig) -> Rope:
    """The vision tower's: half the frequencies turn by the row, half by the column."""
    assert config.vision is not None
    half = _frequencies(config.vision.head_dim // 2, VISION_THETA)
    return Rope(half * 2, (0,) * len(half) + (1,) * len(half))


def _frequencies(dim: int, theta: float) -> tuple[float, ...]:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return tuple((1.0 / theta**exponents).tolist())


def language_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [n, head_dim / 2] of positions [1, n], or [3, 1, n] (time, height, width)."""
    axes = positions.reshape(-1, positions.shape[-1])
    return language_rope(config).angles(axes.expand(3, -1) if len(axes) == 1 else axes)


def vision_angles(
    config: ModelConfig, grid_thw: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [rows, head_dim / 2] and a mask [rows, rows] (true: not seen) for images of these
    grids [images, 3]; rows behind their patches are padding, which sees itself alone."""
    assert config.vision is not None
    merge = config.vision.spatial_merge_size
    parts, frames = [], []
    for frame_count, height, width in grid_thw.tolist():
        down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        order = torch.stack([down, across]).reshape(
            2, height // merge, merge, width // merge, merge
        )
        parts += [order.permute(0, 1, 3, 2, 4).reshape(2, -1)] * frame_count
        frames += [height * width] * frame_count
    positions = torch.cat(parts, 1)
    if positions.shape[1] > rows:
        message = f"{positions.shape[1]} patches do not fit into a graph of {rows}"
        raise ModelError(message, field="patches", remedy="Give the graph more patches.")
    padding = rows - positions.shape[1]
    positions = torch.cat([positions, positions.new_zeros(2, padding)], 1)
    counts = torch.tensor(frames + [1] * padding)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    cos, sin = vision_rope(config).angles(positions)
    return cos, sin, owner[:, None] != owner[None, :]
