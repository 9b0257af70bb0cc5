"""What the vision transformers of Qwen2-VL and Qwen2.5-VL share: patches, attention, merger.

centred: LayerNorms read the residual stream, so what writes it may be centred.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.models.decoder import R1
from buildsys.models.family import Linear, Norm, Turn

if TYPE_CHECKING:
    from buildsys.models.config import VisionConfig

R_VIT = Turn("R_vit")


def patch_embed(vision: VisionConfig, *, centred: bool) -> Linear:
    """The convolution that makes a patch's features of its pixels."""
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return Linear(
        "visual.patch_embed.proj",
        "patch_embed",
        "vision",
        (vision.embed_dim, vision.in_channels, *patch),
        bias=False,
        output_turn=R_VIT,
        centred=centred,
    )


def attention(vision: VisionConfig, layer: int, *, centred: bool) -> Iterator[Linear]:
    """qkv, which reads norm1, and proj."""
    prefix, width = f"visual.blocks.{layer}", vision.embed_dim
    yield Linear(
        f"{prefix}.attn.qkv",
        "qkv",
        "vision",
        (3 * width, width),
        bias=True,
        layer=layer,
        norm=f"{prefix}.norm1",
        input_turn=R_VIT,
        # q and k meet in a product after RoPE; only v may be turned.
        output_turn=Turn("R_vs_vit", layer, vision.num_heads, start=2 * width),
    )
    yield Linear(
        f"{prefix}.attn.proj",
        "proj",
        "vision",
        (width, width),
        bias=True,
        layer=layer,
        input_turn=Turn("R_vs_vit", layer, vision.num_heads),
        output_turn=R_VIT,
        centred=centred,
    )


def merger(vision: VisionConfig, hidden_size: int, *, norm_bias: bool) -> Iterator[Linear | Norm]:
    """A norm, and the MLP that makes one vision token of spatial_merge_size^2 patches."""
    merged, tokens = vision.merged_size, vision.spatial_merge_size**2
    yield Norm("visual.merger.ln_q", "vision", vision.embed_dim, bias=norm_bias)
    yield Linear(
        "visual.merger.mlp.0",
        "merger_fc1",
        "vision",
        (merged, merged),
        bias=True,
        norm="visual.merger.ln_q",
        norm_repeats=tokens,
        input_turn=Turn("R_vit", blocks=tokens),
    )
    yield Linear(
        "visual.merger.mlp.2",
        "merger_fc2",
        "vision",
        (hidden_size, merged),
        bias=True,
        output_turn=R1,
    )
