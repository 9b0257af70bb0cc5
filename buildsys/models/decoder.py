"""The decoder that Llama, Qwen2 and Qwen3 share: norm, attention, norm, gated MLP.

Which matrix acts where is QuaRot's R1 and R2; names and order are those of transformers'
state dict, which mllm's artifacts keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buildsys.models.family import Embedding, Family, Kind, Linear, Norm, Turn

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig

R1 = Turn("R")


@dataclass(frozen=True)
class Decoder:
    """What the families differ in: which linears have biases, and whether each head of q and k
    passes a norm of its own (which no matrix of the residual stream reaches)."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False


def text_family(model_type: str, config: ModelConfig, decoder: Decoder) -> Family:
    """The family of a checkpoint that is a decoder and nothing else."""
    return Family(
        model_type=model_type,
        modules=tuple(language_modules(config, decoder)),
        groups=tuple(language_groups(config)),
        tied=config.tie_word_embeddings,
    )


def language_modules(config: ModelConfig, decoder: Decoder) -> Iterator[Embedding | Linear | Norm]:
    """Embedding, layers, final norm and head, in state-dict order."""
    yield Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, R1)
    for layer in range(config.num_hidden_layers):
        yield from _attention(config, decoder, layer)
        yield from _mlp(config, decoder, layer)
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


def _attention(config: ModelConfig, decoder: Decoder, layer: int) -> Iterator[Linear | Norm]:
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
            bias=decoder.qkv_bias,
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
        bias=decoder.o_bias,
        layer=layer,
        input_turn=Turn("R_v", layer, config.num_attention_heads),
        output_turn=R1,
    )
    if decoder.head_norms:
        for letter in "qk":
            name = f"{prefix}.self_attn.{letter}_norm"
            yield Norm(name, "language", config.head_dim, foldable=False)


def _mlp(config: ModelConfig, decoder: Decoder, layer: int) -> Iterator[Linear]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    kinds: tuple[Kind, ...] = ("gate", "up")
    for kind in kinds:
        yield Linear(
            f"{prefix}.mlp.{kind}_proj",
            kind,
            "language",
            (config.intermediate_size, hidden),
            bias=decoder.mlp_bias,
            layer=layer,
            norm=f"{prefix}.post_attention_layernorm",
            input_turn=R1,
        )
    yield Linear(
        f"{prefix}.mlp.down_proj",
        "down",
        "language",
        (hidden, config.intermediate_size),
        bias=decoder.mlp_bias,
        layer=layer,
        output_turn=R1,
    )
