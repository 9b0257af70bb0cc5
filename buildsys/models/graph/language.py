"""The language model of the Qwen2 family as graphs: layers in runs, one chunk of tokens each.

Inputs of every graph: the hidden state [chunk, hidden], cos and sin [chunk, head_dim / 2] of
the rotary embedding (one half: the other is the same; of Qwen2-VL with its sections laid out),
the additive mask [chunk, past + chunk] and, where earlier chunks can be attended to, every
layer's keys and values of them. Outputs: every layer's keys (behind RoPE) and values of this
chunk [kv heads, chunk, head_dim], and the hidden state. Norms are folded beforehand, and
1/sqrt(head_dim) is a factor of q_proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buildsys.models.errors import ModelError
from buildsys.models.graph.graph import Graph, GraphBuilder

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig

EMBEDDINGS, FINAL = "model.embed_tokens", "model.norm"
FAMILIES = ("qwen2", "qwen2_vl")
COS, SIN, MASK = "cos", "sin", "mask"


@dataclass(frozen=True)
class LayerSizes:
    """What a layer's graph needs to know of the model. epsilon: of its norms."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float


def layer_sizes(config: ModelConfig) -> LayerSizes:
    """The sizes in a config.json; `rms_norm_eps` may be nested. Raises ModelError for a family
    whose layers are others."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{config.model_type!r} has no graphs",
            file=config.file,
            field="model_type",
            remedy=f"Graphs are written for: {', '.join(FAMILIES)}.",
        )
    raw = config.raw
    nested = raw.get("text_config")
    text = {**raw, **nested} if isinstance(nested, dict) else raw
    epsilon = text.get("rms_norm_eps", 1e-6)
    assert isinstance(epsilon, int | float)
    return LayerSizes(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        float(epsilon),
    )


def hidden_name(layer: int) -> str:
    """The hidden state that a layer reads."""
    return EMBEDDINGS if layer == 0 else f"model.layers.{layer - 1}"


def cache_names(layer: int) -> tuple[str, str]:
    """A layer's keys and values of the chunk."""
    return f"model.layers.{layer}.self_attn.key", f"model.layers.{layer}.self_attn.value"


def cache_ranges(layer: int) -> tuple[str, str]:
    """The names of the ranges of a layer's keys and values."""
    return cache_names(layer)[0], f"model.layers.{layer}.self_attn.v_proj"


def past_names(layer: int) -> tuple[str, str]:
    """A layer's keys and values of earlier chunks."""
    key, value = cache_names(layer)
    return f"{key}.past", f"{value}.past"


def language_graph(
    name: str, sizes: LayerSizes, layers: Sequence[int], *, chunk: int, past: int, final: bool
) -> Graph:
    """A run of consecutive layers; `final` adds the last norm (output "model.norm")."""
    build = GraphBuilder(name)
    hidden = build.input(hidden_name(layers[0]), (chunk, sizes.hidden))
    for angle in (COS, SIN):
        build.input(angle, (chunk, sizes.head_dim // 2))
    build.input(MASK, (chunk, past + chunk))
    outputs: list[str] = []
    for layer in layers:
        if past:
            shape = (sizes.kv_heads, past, sizes.head_dim)
            for earlier, kept in zip(past_names(layer), cache_ranges(layer), strict=True):
                build.input(earlier, shape, range=kept)
        hidden = _layer(build, sizes, layer, hidden, chunk, past)
        outputs += cache_names(layer)
    if final:
        hidden = _norm(build, hidden, FINAL, sizes.epsilon)
    return build.graph((*outputs, hidden))


def final_graph(sizes: LayerSizes, layers: int, rows: int) -> Graph:
    """The last norm alone, of a model with so many layers."""
    build = GraphBuilder("final")
    hidden = build.input(hidden_name(layers), (rows, sizes.hidden))
    return build.graph((_norm(build, hidden, FINAL, sizes.epsilon),))


def _layer(
    build: GraphBuilder, sizes: LayerSizes, layer: int, hidden: str, chunk: int, past: int
) -> str:
    prefix = f"model.layers.{layer}"
    x = _norm(build, hidden, f"{prefix}.input_layernorm", sizes.epsilon)
    x = _attention(build, sizes, f"{prefix}.self_attn", x, chunk, past)
    hidden = build.elementwise("add", (hidden, x), f"{prefix}.self_attn.residual")
    x = _norm(build, hidden, f"{prefix}.post_attention_layernorm", sizes.epsilon)
    x = _mlp(build, sizes, f"{prefix}.mlp", x)
    return build.elementwise("add", (hidden, x), prefix)


def _norm(build: GraphBuilder, x: str, name: str, epsilon: float) -> str:
    return build.elementwise("rms_norm", (x,), name, epsilon=epsilon)


def _attention(
    build: GraphBuilder, sizes: LayerSizes, prefix: str, x: str, chunk: int, past: int
) -> str:
    dim, kv, group = sizes.head_dim, sizes.kv_heads, sizes.heads // sizes.kv_heads
    q = build.linear(x, f"{prefix}.q_proj", sizes.heads * dim, bias=True, gain=dim**-0.5)
    k = build.linear(x, f"{prefix}.k_proj", kv * dim, bias=True)
    v = build.linear(x, f"{prefix}.v_proj", kv * dim, bias=True)
    query = rope(build, heads_first(build, q, sizes.heads), f"{prefix}.query")
    key = rope(build, heads_first(build, k, kv), f"{prefix}.key")
    v = build.reshape(v, f"{v}.split", (chunk, kv, dim))
    value = build.transpose(v, f"{prefix}.value", (1, 0, 2))
    build.around_zero(key, value)
    keys, values = key, value
    if past:
        keys = build.concat((f"{key}.past", key), f"{key}.all", 1)
        values = build.concat((f"{value}.past", value), f"{value}.all", 1)
    # The heads of one group attend to the same keys: they lie below one another.
    query = build.reshape(query, f"{query}.grouped", (kv, group * chunk, dim))
    mask_shape = (kv, group, chunk, past + chunk)
    seen = attend(build, prefix, query, keys, values, mask_shape)
    seen = build.reshape(seen, f"{seen}.heads", (sizes.heads, chunk, dim))
    return build.linear(merge_heads(build, seen), f"{prefix}.o_proj", sizes.hidden, bias=False)


def _mlp(build: GraphBuilder, sizes: LayerSizes, prefix: str, x: str) -> str:
    gate = build.linear(x, f"{prefix}.gate_proj", sizes.intermediate, bias=False)
    up = build.linear(x, f"{prefix}.up_proj", sizes.intermediate, bias=False)
    opened = build.elementwise("sigmoid", (gate,), f"{prefix}.sigmoid")
    silu = build.elementwise("mul", (gate, opened), f"{prefix}.silu")
    product = build.elementwise("mul", (silu, up), f"{prefix}.product")
    return build.linear(product, f"{prefix}.down_proj", sizes.hidden, bias=False)


def heads_first(build: GraphBuilder, x: str, heads: int) -> str:
    """[rows, heads x dim] -> [heads, rows, dim]."""
    rows, width = build.shape(x)
    x = build.reshape(x, f"{x}.split", (rows, heads, width // heads))
    return build.transpose(x, f"{x}.heads", (1, 0, 2))


def merge_heads(build: GraphBuilder, x: str) -> str:
    """[heads, rows, dim] -> [rows, heads x dim]."""
    heads, rows, dim = build.shape(x)
    turned = build.transpose(x, f"{x}.turned", (1, 0, 2))
    return build.reshape(turned, f"{x}.merged", (rows, heads * dim))


def rope(build: GraphBuilder, x: str, output: str) -> str:
    """Rotary embedding of x [heads, rows, dim]: the halves (a, b) become
    (a cos - b sin, b cos + a sin)."""
    half = build.shape(x)[2] // 2
    a = build.slice(x, f"{output}.first", 2, 0, half)
    b = build.slice(x, f"{output}.second", 2, half, 2 * half)
    products = {}
    for side, part in (("first", a), ("second", b)):
        for angle in (COS, SIN):
            name = f"{output}.{side}.{angle}"
            products[side, angle] = build.elementwise(
                "mul", (part, angle), name, range=f"{output}.products"
            )
    first = (products["first", COS], products["second", SIN])
    second = (products["second", COS], products["first", SIN])
    turned = (
        build.elementwise("sub", first, f"{output}.first.turned", range=output),
        build.elementwise("add", second, f"{output}.second.turned", range=output),
    )
    return build.concat(turned, output, 2)


def attend(
    build: GraphBuilder,
    prefix: str,
    query: str,
    keys: str,
    values: str,
    mask_shape: tuple[int, ...],
) -> str:
    """softmax(query keys^T + mask) values, of query [batch, n, dim], keys and values [batch, m,
    dim]. mask_shape: of the scores when the mask [rows, m] is added."""
    turned = build.transpose(keys, f"{keys}.turned", (0, 2, 1))
    scores = build.matmul(query, turned, f"{prefix}.scores")
    flat = build.shape(scores)
    scores = build.reshape(scores, f"{scores}.by_row", mask_shape)
    masked = build.elementwise("add", (scores, MASK), f"{prefix}.masked")
    weights = build.elementwise("softmax", (masked,), f"{prefix}.softmax", axis=-1)
    weights = build.reshape(weights, f"{weights}.flat", flat)
    return build.matmul(weights, values, f"{prefix}.attended")
