"""Qwen3: every head of q and k passes a norm of its own, and no linear has a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.models.decoder import Decoder, text_family

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig
    from buildsys.models.family import Family


def describe(config: ModelConfig) -> Family:
    """The family of a Qwen3ForCausalLM checkpoint."""
    biases = config.attention_bias
    return text_family("qwen3", config, Decoder(qkv_bias=biases, o_bias=biases, head_norms=True))
