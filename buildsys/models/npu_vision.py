"""Qwen2-VL's vision encoder as NPUs want it: the same function of the same weights.

Four changes, each of which leaves the result as it was (up to the order of float sums):
    merged patchify   the image comes in merge order (buildsys.models.patch_grid), so that no
                      permutation of tokens is left inside the encoder, and the merger is a view
    Conv3d -> Conv2d  the frames of a patch become planes: W2[o, t C + c, r, q] = W3[o, c, t, r, q]
    cached RoPE       cosines and sines of one grid are constants
    split QKV         one linear for q, one for k, one for v
For one still image (one frame group), whose tokens all see each other.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from buildsys.models.patch_grid import PatchGrid


class NpuVision(nn.Module):
    """images [1, planes, height, width] -> merged tokens [blocks, hidden].

    visual: transformers' vision tower; its other modules are shared, not copied.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, visual: nn.Module, grid: PatchGrid) -> None:
        super().__init__()
        source = cast(Any, visual)
        self.patch_embed = conv2d_of(source.patch_embed.proj)
        self.blocks = nn.ModuleList(NpuVisionBlock(block) for block in source.blocks)
        self.merger = source.merger
        cos, sin = cached_vision_rope(visual, grid)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # [1, embed, blocks, merge * merge]: raster order is the order of tokens.
        patches: Tensor = self.patch_embed(images)
        hidden = patches.flatten(2)[0].transpose(0, 1)
        for block in self.blocks:
            hidden = block(hidden, self.cos, self.sin)
        merged: Tensor = self.merger(hidden)
        return merged


class NpuVisionBlock(nn.Module):
    """One block with q, k and v apart. tokens [n, embed], cos and sin [n, head_dim]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        source = cast(Any, block)
        self.norm1, self.norm2, self.mlp = source.norm1, source.norm2, source.mlp
        self.q, self.k, self.v = split_qkv(source.attn.qkv)
        self.proj = source.attn.proj
        self.num_heads = int(source.attn.num_heads)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = tokens + self._attend(self.norm1(tokens), cos, sin)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out

    def _attend(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self._heads(self.q(tokens)), cos, sin)
        k = rotate(self._heads(self.k(tokens)), cos, sin)
        seen = functional.scaled_dot_product_attention(q, k, self._heads(self.v(tokens)))
        out: Tensor = self.proj(seen.transpose(0, 1).reshape(tokens.shape))
        return out

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.view(len(tokens), self.num_heads, -1).transpose(0, 1)


def conv2d_of(conv: nn.Conv3d) -> nn.Conv2d:
    """The convolution over frames x channels planes that equals one over frames and channels."""
    out, channels, frames, height, width = conv.weight.shape
    flat = nn.Conv2d(frames * channels, out, (height, width), (height, width), bias=False)
    weight = conv.weight.detach().transpose(1, 2).reshape(out, frames * channels, height, width)
    flat.weight = nn.Parameter(weight, requires_grad=False)
    return flat


def split_qkv(qkv: nn.Linear) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Three linears of a third of the rows each; they share the weights of the one."""
    third = qkv.out_features // 3
    parts = []
    for start in range(0, qkv.out_features, third):
        with torch.device("meta"):
            part = nn.Linear(qkv.in_features, third)
        rows = slice(start, start + third)
        part.weight = nn.Parameter(qkv.weight.detach()[rows], requires_grad=False)
        part.bias = nn.Parameter(qkv.bias.detach()[rows], requires_grad=False)
        parts.append(part)
    return parts[0], parts[1], parts[2]


def cached_vision_rope(visual: nn.Module, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim] of one grid, in the order of tokens."""
    inverse = cast(Any, visual).rotary_pos_emb.inv_freq
    positions = _positions(grid)
    angles = torch.cat([positions[:, axis, None].float() * inverse for axis in (0, 1)], dim=-1)
    twice = torch.cat([angles, angles], dim=-1)
    return twice.cos(), twice.sin()


def _positions(grid: PatchGrid) -> Tensor:
    """(row, column) [tokens, 2] of each patch: blocks row by row, patches of a block likewise."""
    merge = grid.vision.spatial_merge_size
    rows, columns = torch.meshgrid(
        torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij"
    )
    whole = torch.stack([rows, columns], dim=-1)
    blocks = whole.view(grid.rows // merge, merge, grid.columns // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [heads, n, head_dim] by cos and sin [n, head_dim] (halves, as in transformers)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
