"""config.json in any layout that checkpoints have, as one normalised value.

Classic checkpoints are flat (text fields at the top, `vision_config` nested); transformers 5
nests the text fields in `text_config` too. Both give the same `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buildsys.formats.config_file import ConfigFile, read_config


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. Sizes in features; mlp_size is the width between fc1 and fc2."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def merged_size(self) -> int:
        """Features of one merged token before the merger's MLP."""
        return self.embed_dim * self.spatial_merge_size**2


@dataclass(frozen=True)
class ModelConfig:
    """What the descriptors need. `raw` is the file's own content, for transformers."""

    file: Path
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    vision: VisionConfig | None
    image_token_id: int | None
    raw: Mapping[str, object]


def read_model_config(folder: Path) -> ModelConfig:
    """The normalised config.json of a model folder.

    Raises FormatError naming the field that is missing or impossible.
    """
    return normalise(read_config(folder))


def normalise(config: ConfigFile) -> ModelConfig:
    """A config in classic or transformers-5 layout as a ModelConfig. Raises FormatError."""
    text = config
    if config.has("text_config"):
        nested = config.section("text_config")
        text = ConfigFile(config.path, {**config.fields, **nested.fields})
    heads = _size(text, "num_attention_heads")
    hidden = _size(text, "hidden_size")
    if not text.has("head_dim") and hidden % heads:
        raise text.wrong("hidden_size", f"{hidden} is no multiple of the {heads} heads")
    return ModelConfig(
        file=config.path,
        model_type=config.text("model_type"),
        vocab_size=_size(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(text, "intermediate_size"),
        num_hidden_layers=_size(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_size(text, "num_key_value_heads", heads),
        head_dim=_size(text, "head_dim", hidden // heads),
        # transformers 5 moved the flag to the top; files of version 4 may have it nested only.
        tie_word_embeddings=config.flag("tie_word_embeddings", False)
        or text.flag("tie_word_embeddings", False),
        attention_bias=text.flag("attention_bias", False),
        mlp_bias=text.flag("mlp_bias", False),
        vision=_vision(config) if config.has("vision_config") else None,
        image_token_id=config.integer("image_token_id") if config.has("image_token_id") else None,
        raw=config.fields,
    )


def _vision(model: ConfigFile) -> VisionConfig:
    config = model.section("vision_config")
    # Qwen2-VL calls the language model's width hidden_size here; its successor means its own.
    newer = model.text("model_type") == "qwen2_5_vl"
    width = "hidden_size" if newer else "embed_dim"
    embed = _size(config, width)
    heads = _size(config, "num_heads")
    if embed % heads:
        raise config.wrong(width, f"{embed} is no multiple of the {heads} heads")
    return VisionConfig(
        depth=_size(config, "depth"),
        embed_dim=embed,
        num_heads=heads,
        mlp_size=_size(config, "intermediate_size")
        if newer
        else int(embed * config.number("mlp_ratio", 4)),
        # Classic files say in_chans, which transformers ignores: there are 3 either way.
        in_channels=_size(config, "in_channels", 3),
        patch_size=_size(config, "patch_size", 14),
        temporal_patch_size=_size(config, "temporal_patch_size", 2),
        spatial_merge_size=_size(config, "spatial_merge_size", 2),
    )


def _size(config: ConfigFile, field: str, default: int | None = None) -> int:
    value = config.integer(field, default)
    if value <= 0:
        raise config.wrong(field, f"is {value}, not a positive integer")
    return value
