"""Qwen2-VL's language model as NPUs want it: the same function of the same weights.

cached RoPE        cosines and sines are rows of a table, looked up by position
last-query slice   the last layer asks for the last token alone: of all others it needs keys
                   and values, and nothing of them is read afterwards
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from buildsys.models.npu_vision import rotate

# As long as the tables of the vendor's parser.
POSITIONS = 16384


class CachedRotary(nn.Module):
    """cos and sin [1, n, head_dim] for position_ids [3, 1, n] (time, height, width).

    rotary: transformers' rotary embedding of Qwen2-VL's language model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary: nn.Module, positions: int = POSITIONS) -> None:
        super().__init__()
        source = cast(Any, rotary)
        sections = list(source.mrope_section)
        angles = torch.arange(positions)[:, None].float() * source.inv_freq.float()
        self.register_buffer("cos", angles.cos() * source.attention_scaling, persistent=False)
        self.register_buffer("sin", angles.sin() * source.attention_scaling, persistent=False)
        # Each frequency turns with one axis: sections of them take time, height, width in turn.
        self.axes = [(start, i % 3) for i, start in enumerate(_starts(sections))]
        self.ends = [start + size for start, size in zip(_starts(sections), sections, strict=True)]

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._look_up(self.cos, hidden, position_ids), self._look_up(
            self.sin, hidden, position_ids
        )

    def _look_up(self, table: Tensor, hidden: Tensor, position_ids: Tensor) -> Tensor:
        half = torch.cat(
            [
                table[position_ids[axis], start:end]
                for (start, axis), end in zip(self.axes, self.ends, strict=True)
            ],
            dim=-1,
        )
        return torch.cat([half, half], dim=-1).to(hidden.dtype)


def _starts(sections: list[int]) -> list[int]:
    return [sum(sections[:i]) for i in range(len(sections))]


class LastQueryLayer(nn.Module):
    """A decoder layer that gives the last token's output [1, 1, hidden] alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        source = cast(Any, layer)
        self.self_attn, self.mlp = source.self_attn, source.mlp
        self.input_layernorm = source.input_layernorm
        self.post_attention_layernorm = source.post_attention_layernorm

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = cast(Any, self.self_attn)
        normed = self.input_layernorm(hidden)
        q = rotate(_heads(attention.q_proj(normed[:, -1:]), attention), cos[:, -1:], sin[:, -1:])
        k = rotate(_heads(attention.k_proj(normed), attention), cos, sin)
        v = _heads(attention.v_proj(normed), attention)
        # The last query sees every key: no mask.
        seen = functional.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)
        last = hidden[:, -1:] + attention.o_proj(seen.transpose(1, 2).reshape(1, 1, -1))
        out: Tensor = last + self.mlp(self.post_attention_layernorm(last))
        return out


def _heads(projected: Tensor, attention: Any) -> Tensor:
    """[heads, n, head_dim] of [1, n, heads * head_dim]."""
    return projected[0].view(projected.shape[1], -1, attention.head_dim).transpose(0, 1)


class NpuLanguage(nn.Module):
    """inputs_embeds [1, n, hidden], position_ids [3, 1, n] -> logits [1, 1, vocab] of the last.

    module: transformers' Qwen2VLForConditionalGeneration; its weights are shared, not copied.
    """

    def __init__(self, module: nn.Module, positions: int = POSITIONS) -> None:
        super().__init__()
        text = cast(Any, module).model.language_model
        self.layers = nn.ModuleList(text.layers[:-1])
        self.last = LastQueryLayer(text.layers[-1])
        self.rotary = CachedRotary(text.rotary_emb, positions)
        self.norm, self.head = text.norm, cast(Any, module).lm_head

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        cos, sin = self.rotary(inputs_embeds, position_ids)
        hidden = inputs_embeds
        for layer in self.layers:
            # No mask: transformers' attention is causal then.
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        out: Tensor = self.head(self.norm(self.last(hidden, cos, sin)))
        return out
