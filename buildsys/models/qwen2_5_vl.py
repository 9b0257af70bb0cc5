"""Qwen2.5-VL: Qwen2's decoder behind a vision transformer with RMSNorms and gated MLPs.

Its attention looks at windows, in all blocks but a few; no matrix here knows of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.models.decoder import R1, language_groups, language_modules
from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Kind, Linear, Norm, Turn
from buildsys.models.qwen2 import QWEN2

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig, VisionConfig

R_VIT = Turn("R_vit")


def describe(config: ModelConfig) -> Family:
    """The family of a Qwen2_5_VLForConditionalGeneration checkpoint. Raises ModelError."""
    if config.vision is None:
        raise ModelError("is missing", file=config.file, field="vision_config")
    vision = config.vision
    gated = (
        tuple(f"visual.blocks.{layer}.mlp.{kind}_proj" for kind in ("gate", "up"))
        for layer in range(vision.depth)
    )
    return Family(
        model_type="qwen2_5_vl",
        modules=(
            *_vision_modules(vision, config.hidden_size),
            *language_modules(config, QWEN2),
        ),
        groups=(*gated, *language_groups(config)),
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
    )
    for layer in range(vision.depth):
        yield from _block(vision, layer)
    yield Norm("visual.merger.ln_q", "vision", vision.embed_dim)
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
    yield Norm(f"{prefix}.norm1", "vision", width)
    yield Norm(f"{prefix}.norm2", "vision", width)
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
    )
    kinds: tuple[tuple[str, Kind], ...] = (("gate_proj", "vit_gate"), ("up_proj", "vit_up"))
    for name, kind in kinds:
        yield Linear(
            f"{prefix}.mlp.{name}",
            kind,
            "vision",
            (vision.mlp_size, width),
            bias=True,
            layer=layer,
            norm=f"{prefix}.norm2",
            input_turn=R_VIT,
        )
    yield Linear(
        f"{prefix}.mlp.down_proj",
        "vit_down",
        "vision",
        (width, vision.mlp_size),
        bias=True,
        layer=layer,
        output_turn=R_VIT,
    )
