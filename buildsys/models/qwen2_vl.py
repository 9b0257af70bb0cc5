"""Qwen2-VL: a vision transformer with a merger that writes into Qwen2's residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.models.decoder import R1, language_groups, language_modules
from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Linear, Norm, Turn
from buildsys.models.qwen2 import QWEN2

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig, VisionConfig

R_VIT = Turn("R_vit")


def describe(config: ModelConfig) -> Family:
    """The family of a Qwen2VLForConditionalGeneration checkpoint. Raises ModelError."""
    if config.vision is None:
        raise ModelError("is missing", file=config.file, field="vision_config")
    return Family(
        model_type="qwen2_vl",
        modules=(
            *_vision_modules(config.vision, config.hidden_size),
            *language_modules(config, QWEN2),
        ),
        groups=tuple(language_groups(config)),
        tied=config.tie_word_embeddings,
    )


def _vision_modules(vision: VisionConfig, hidden_size: int) -> Iterator[Linear | Norm]:
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield Linear(
        "visual.patch_embed.proj",
        "patch_embed",
        "vision",
        (vision.embed_dim, vision.in_channels, *patch),
        bias=False,
        output_turn=R_VIT,
        centred=True,
    )
    for layer in range(vision.depth):
        yield from _block(vision, layer)
    yield Norm("visual.merger.ln_q", "vision", vision.embed_dim, bias=True)
    merged, tokens = vision.merged_size, vision.spatial_merge_size**2
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


def _block(vision: VisionConfig, layer: int) -> Iterator[Linear | Norm]:
    prefix, width = f"visual.blocks.{layer}", vision.embed_dim
    heads = Turn("R_vs_vit", layer, vision.num_heads)
    yield Norm(f"{prefix}.norm1", "vision", width, bias=True)
    yield Norm(f"{prefix}.norm2", "vision", width, bias=True)
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
        input_turn=heads,
        output_turn=R_VIT,
        centred=True,
    )
    yield Linear(
        f"{prefix}.mlp.fc1",
        "fc1",
        "vision",
        (vision.mlp_size, width),
        bias=True,
        layer=layer,
        norm=f"{prefix}.norm2",
        input_turn=R_VIT,
    )
    yield Linear(
        f"{prefix}.mlp.fc2",
        "fc2",
        "vision",
        (width, vision.mlp_size),
        bias=True,
        layer=layer,
        output_turn=R_VIT,
        centred=True,
    )
