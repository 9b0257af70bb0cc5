"""Qwen2: a Llama-like decoder with biases on q, k and v (and Llama checkpoints written as one).

Which matrix acts where is QuaRot's R1 and R2; names and order are those of transformers'
state dict, which mllm's artifacts keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.models.family import Embedding, Family, Kind, Linear, Norm, Turn

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig

R1 = Turn("R")


def describe(config: ModelConfig) -> Family:
    """The family of a Qwen2ForCausalLM checkpoint."""
    return Family(
        model_type="qwen2",
        modules=tuple(language_modules(config)),
        groups=tuple(language_groups(config)),
        tied=config.tie_word_embeddings,
    )


def language_modules(config: ModelConfig) -> Iterator[Embedding | Linear | Norm]:
    """Embedding, layers, final norm and head, in state-dict order."""
    yield Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, R1)
    for layer in range(config.num_hidden_layers):
        yield from _attention(config, layer)
        yield from _mlp(config, layer)
        prefix = f"model.layers.{layer}"
        yield Norm(f"{prefix}.input_layernorm", "language", config.hidden_size)
        yield Norm(f"{prefix}.post_attention_layernorm", "language", config.hidden_size)
    yield Norm("model.norm", "language", config.hidden_size)
    yield Linear(
        "lm_head",
        "head",
        "language",
        (config.vocab_size, config.hidden_size),
        bias=False,
        norm="model.norm",
        input_turn=R1,
    )


def language_groups(config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """{q, k, v} and {gate, up} of every layer: each group reads one tensor."""
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield tuple(f"{prefix}.self_attn.{kind}_proj" for kind in "qkv")
        yield tuple(f"{prefix}.mlp.{kind}_proj" for kind in ("gate", "up"))


def _attention(config: ModelConfig, layer: int) -> Iterator[Linear]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    kinds: tuple[tuple[Kind, int], ...] = (("q", queries), ("k", keys), ("v", keys))
    for kind, features in kinds:
        yield Linear(
            f"{prefix}.self_attn.{kind}_proj",
            kind,
            "language",
            (features, hidden),
            bias=True,
            layer=layer,
            norm=f"{prefix}.input_layernorm",
            input_turn=R1,
            output_turn=Turn("R_v", layer, config.num_key_value_heads) if kind == "v" else None,
        )
    yield Linear(
        f"{prefix}.self_attn.o_proj",
        "o",
        "language",
        (hidden, queries),
        bias=False,
        layer=layer,
        input_turn=Turn("R_v", layer, config.num_attention_heads),
        output_turn=R1,
    )


def _mlp(config: ModelConfig, layer: int) -> Iterator[Linear]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    kinds: tuple[Kind, ...] = ("gate", "up")
    for kind in kinds:
        yield Linear(
            f"{prefix}.mlp.{kind}_proj",
            kind,
            "language",
            (config.intermediate_size, hidden),
            bias=False,
            layer=layer,
            norm=f"{prefix}.post_attention_layernorm",
            input_turn=R1,
        )
    yield Linear(
        f"{prefix}.mlp.down_proj",
        "down",
        "language",
        (hidden, config.intermediate_size),
        bias=False,
        layer=layer,
        output_turn=R1,
    )
