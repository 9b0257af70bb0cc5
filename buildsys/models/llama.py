"""Llama (and what is written as one: Mistral, SmolLM2): no biases, unless the config says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.models.decoder import Decoder, text_family

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig
    from buildsys.models.family import Family


def describe(config: ModelConfig) -> Family:
    """The family of a LlamaForCausalLM checkpoint."""
    biases = config.attention_bias
    decoder = Decoder(qkv_bias=biases, o_bias=biases, mlp_bias=config.mlp_bias)
    return text_family("llama", config, decoder)
