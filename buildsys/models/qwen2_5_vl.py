"""Qwen2.5-VL: Qwen2's decoder behind a vision transformer with RMSNorms and gated MLPs.

Its attention looks at windows, in all blocks but a few; no matrix here knows of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.models.decoder import language_groups, language_modules
from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Kind, Linear, Norm
from buildsys.models.qwen2 import QWEN2
from buildsys.models.vision_tower import R_VIT, attention, merger, patch_embed

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig, VisionConfig


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
    yield patch_embed(vision, centred=False)
    for layer in range(vision.depth):
        yield from _block(vision, layer)
    yield from merger(vision, hidden_size, norm_bias=False)


def _block(vision: VisionConfig, layer: int) -> Iterator[Linear | Norm]:
    prefix, width = f"visual.blocks.{layer}", vision.embed_dim
    yield Norm(f"{prefix}.norm1", "vision", width)
    yield Norm(f"{prefix}.norm2", "vision", width)
    yield from attention(vision, layer, centred=False)
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
