"""Qwen2 and Qwen2.5, which has the same architecture: biases on q, k and v and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.models.decoder import Decoder, text_family

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig
    from buildsys.models.family import Family

QWEN2 = Decoder(qkv_bias=True)


def describe(config: ModelConfig) -> Family:
    """The family of a Qwen2ForCausalLM checkpoint."""
    return text_family("qwen2", config, QWEN2)
