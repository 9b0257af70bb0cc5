"""Qwen2-VL: a vision transformer with a merger that writes into Qwen2's residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.models.decoder import language_groups, language_modules
from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Linear, Norm
from buildsys.models.qwen2 import QWEN2
from buildsys.models.vision_tower import R_VIT, attention, merger, patch_embed

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig, VisionConfig


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
    yield patch_embed(vision, centred=True)
    for layer in range(vision.depth):
        yield from _block(vision, layer)
    yield from merger(vision, hidden_size, norm_bias=True)


def _block(vision: VisionConfig, layer: int) -> Iterator[Linear | Norm]:
    prefix, width = f"visual.blocks.{layer}", vision.embed_dim
    yield Norm(f"{prefix}.norm1", "vision", width, bias=True)
    yield Norm(f"{prefix}.norm2", "vision", width, bias=True)
    yield from attention(vision, layer, centred=True)
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
