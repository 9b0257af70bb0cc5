"""Qwen2-VL's vision encoder as graphs: patches in, merged tokens out; one, or several in a row.

Inputs: "pixels" [patches, channels x frames x patch x patch] as transformers' processor orders
them, cos and sin [patches, head_dim / 2] of the 2D rotary embedding, and the additive mask
[patches, patches]: any grid of at most so many patches fits, the rest is padding that nobody
attends to. Output: "visual.merger.mlp.2" [patches / merge^2, hidden].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from buildsys.models.errors import ModelError
from buildsys.models.graph.graph import Graph, GraphBuilder
from buildsys.models.graph.language import COS, MASK, SIN, attend, heads_first, merge_heads, rope

if TYPE_CHECKING:
    from buildsys.models.config import ModelConfig, VisionConfig

PIXELS, EMBED = "pixels", "visual.patch_embed.proj"
MERGED = "visual.merger.mlp.2"
# All of Qwen2-VL's norms there have it, whatever the config says.
EPSILON = 1e-6
# quick_gelu(x) = x sigmoid(1.702 x).
QUICK_GELU = 1.702


def vision_graph(
    name: str,
    config: ModelConfig,
    tensors: Collection[str],
    *,
    patches: int,
    blocks: Sequence[int],
    embed: bool = False,
    merger: bool = False,
) -> Graph:
    """A run of consecutive blocks; embed: with the patch embedding before them; merger: with it
    behind them. tensors: names that the checkpoint has, which tell whether a norm is a
    LayerNorm. Raises ModelError for another activation."""
    vision = config.vision
    assert vision is not None
    build = GraphBuilder(name)
    if embed:
        features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        hidden = build.input(PIXELS, (patches, features))
    else:
        before = hidden_name(blocks[0] if blocks else vision.depth)
        hidden = build.input(before, (patches, vision.embed_dim))
    if blocks:
        for angle in (COS, SIN):
            build.input(angle, (patches, vision.head_dim // 2))
        build.input(MASK, (patches, patches))
    if embed:
        hidden = build.linear(hidden, EMBED, vision.embed_dim, bias=False)
    quick = _is_quick(config)
    for block in blocks:
        hidden = _block(build, vision, f"visual.blocks.{block}", hidden, tensors, quick)
    if merger:
        hidden = _merger(build, vision, hidden, tensors, config.hidden_size)
    return build.graph((hidden,))


def hidden_name(block: int) -> str:
    """The hidden state that a block reads."""
    return EMBED if block == 0 else f"visual.blocks.{block - 1}"


def _merger(
    build: GraphBuilder, vision: VisionConfig, x: str, tensors: Collection[str], features: int
) -> str:
    x = _norm(build, x, "visual.merger.ln_q", tensors)
    tokens = build.shape(x)[0] // vision.spatial_merge_size**2
    x = build.reshape(x, "visual.merger.side_by_side", (tokens, vision.merged_size))
    x = build.linear(x, "visual.merger.mlp.0", vision.merged_size, bias=True)
    x = build.elementwise("gelu", (x,), "visual.merger.mlp.1")
    return build.linear(x, MERGED, features, bias=True)


def _is_quick(config: ModelConfig) -> bool:
    raw = config.raw.get("vision_config")
    name = raw.get("hidden_act", "quick_gelu") if isinstance(raw, dict) else "quick_gelu"
    if name not in ("quick_gelu", "gelu"):
        message = f"{name!r} is not supported in a graph"
        raise ModelError(message, file=config.file, field="vision_config.hidden_act")
    return bool(name == "quick_gelu")


def _block(
    build: GraphBuilder,
    vision: VisionConfig,
    prefix: str,
    hidden: str,
    tensors: Collection[str],
    quick: bool,
) -> str:
    x = _norm(build, hidden, f"{prefix}.norm1", tensors)
    x = _attention(build, vision, f"{prefix}.attn", x)
    hidden = build.elementwise("add", (hidden, x), f"{prefix}.attn.residual")
    x = _norm(build, hidden, f"{prefix}.norm2", tensors)
    x = build.linear(x, f"{prefix}.mlp.fc1", vision.mlp_size, bias=True)
    if quick:
        scaled = build.elementwise("mul", (x,), f"{prefix}.mlp.scaled", value=QUICK_GELU)
        opened = build.elementwise("sigmoid", (scaled,), f"{prefix}.mlp.sigmoid")
        x = build.elementwise("mul", (x, opened), f"{prefix}.mlp.act")
    else:
        x = build.elementwise("gelu", (x,), f"{prefix}.mlp.act")
    x = build.linear(x, f"{prefix}.mlp.fc2", vision.embed_dim, bias=True)
    return build.elementwise("add", (hidden, x), prefix)


def _attention(build: GraphBuilder, vision: VisionConfig, prefix: str, x: str) -> str:
    """One linear makes q, k and v; each has a range of its own, so each is one here."""
    patches = build.shape(x)[0]
    width, heads = vision.embed_dim, vision.num_heads
    parts = {}
    for number, name in enumerate("qkv"):
        attributes: dict[str, object] = {
            "weight": f"{prefix}.qkv.weight",
            "bias": f"{prefix}.qkv.bias",
            "rows": (number * width, (number + 1) * width),
        }
        if name == "q":
            attributes["gain"] = vision.head_dim**-0.5
        shape = (patches, width)
        parts[name] = build.node("linear", (x,), f"{prefix}.{name}", shape, attributes=attributes)
    query = rope(build, heads_first(build, parts["q"], heads), f"{prefix}.query")
    key = rope(build, heads_first(build, parts["k"], heads), f"{prefix}.key")
    value = heads_first(build, parts["v"], heads)
    build.around_zero(key, value)
    seen = attend(build, prefix, query, key, value, (heads, patches, patches))
    return build.linear(merge_heads(build, seen), f"{prefix}.proj", width, bias=True)


def _norm(build: GraphBuilder, x: str, name: str, tensors: Collection[str]) -> str:
    """A norm whose gain and bias are folded. Without a bias it is an RMSNorm (mllm's
    construction of the rotation)."""
    if f"{name}.bias" not in tensors:
        return build.elementwise("rms_norm", (x,), name, epsilon=EPSILON)
    return build.elementwise("layer_norm", (x,), name, epsilon=EPSILON)
