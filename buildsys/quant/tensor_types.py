"""Which type each tensor of a block-quantized .mllm gets: mllm's own rules, or a config's.

By type: mllm v1's quantizer looks for parts of names, the first hit decides; then rows must
divide into blocks, which mllm does not check. By config: regular expressions, as mllm v2's
quantizer takes them, but what it passes over in silence (a pattern that matches nothing, two
for one tensor, a lost bias) is an error or does not happen.
Source: mllm v1 tools/quantizer; mllm v2 tools/mllm-quantizer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from buildsys.quant import kleidiai
from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import BLOCKS

PLAIN = "F32"
# A packing for a matmul kernel of KleidiAI: this, and the kernel's name.
PACKED = "KAI "
EMBEDDINGS = ("embed_tokens", "word_embeddings")
KEPT_PLAIN = (
    "norm", "rope", "bias", "rotary_emb", "_GN", "class_embedding", "embeddings", "logit_scale",
    "modality_preprocessors", "modality_heads", "modality_postprocessors",
    "pre_transformer_layer", "pos_embed.inv_freq", "ln_q", "patch_embed.proj",
)  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Shapes by name, in the checkpoint's order; None where the file does not tell.
Shapes = Mapping[str, "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Target:
    """One tensor of the result: `source` of the checkpoint, in blocks of `type` or in F32.

    shape: None where nobody knows it (F32 only). instead_of: the type that was asked for where
    this is the fallback.
    """

    name: str
    source: str
    type: str
    shape: tuple[int, ...] | None
    instead_of: str | None = None


@dataclass(frozen=True)
class Hint:
    """One entry of a config: full matches of `pattern` get `type`.

    replace: False keeps the original too, the result is added as `rename`. rename: name of the
    result. shape: [out, in] of tensors whose file does not tell.
    """

    pattern: str
    type: str
    replace: bool = True
    rename: str | None = None
    shape: tuple[int, ...] | None = None


def mllm_type(name: str, requested: str) -> str:
    """The type that mllm v1's quantizer gives a tensor of this name when asked for `requested`."""
    if any(part in name for part in EMBEDDINGS):
        return "Q4_0"
    return PLAIN if any(part in name for part in KEPT_PLAIN) else requested


def targets_by_type(shapes: Shapes, requested: str, fallback: str | None = None) -> list[Target]:
    """mllm v1's result: sorted by name; a head made from a tied embedding comes last.

    Raises QuantError, naming the tensor, where rows do not divide into blocks and neither does
    the fallback.
    """
    targets = [
        _fitted(name, name, mllm_type(name, requested), shapes[name], fallback)
        for name in sorted(shapes)
    ]
    if HEAD not in shapes and EMBEDDING in shapes:
        targets.append(_fitted(HEAD, EMBEDDING, requested, shapes[EMBEDDING], fallback))
    return targets


def targets_by_config(
    shapes: Shapes, hints: Iterable[Hint], fallback: str | None = None
) -> list[Target]:
    """What a config makes, sorted by name; what no pattern matches stays, in F32.

    Raises QuantError for a pattern that matches nothing or biases only, for two that replace
    one tensor, and where two results have one name.
    """
    replaced: dict[str, tuple[str, Target]] = {}
    added: list[Target] = []
    for hint in sorted(hints, key=lambda hint: hint.pattern):
        matched = _matches(hint, shapes)
        for name in matched:
            shape = hint.shape or shapes[name]
            target = _fitted(hint.rename or name, name, hint.type, shape, fallback)
            if not hint.replace:
                added.append(target)
            elif name in replaced:
                patterns = f"{replaced[name][0]!r} and {hint.pattern!r}"
                raise QuantError(f"{name}: the patterns {patterns} both replace it; keep one")
            else:
                replaced[name] = (hint.pattern, target)
    kept = [Target(name, name, PLAIN, shapes[name]) for name in shapes if name not in replaced]
    targets = sorted(
        [*kept, *added, *(target for _, target in replaced.values())], key=lambda t: t.name
    )
    for one, other in pairwise(targets):
        if one.name == other.name:
            raise QuantError(
                f"{one.name}: would be made twice, from {one.source} and from {other.source}; "
                "change `rename`, or let a pattern match one tensor only"
            )
    return targets


def _matches(hint: Hint, shapes: Shapes) -> list[str]:
    names = [name for name in shapes if re.fullmatch(hint.pattern, name)]
    weights = [name for name in names if not name.endswith(".bias")]
    if not names:
        literal = hint.pattern.replace("\\", "")
        near = difflib.get_close_matches(literal, shapes, n=1, cutoff=0.3)
        example = f", for example {near[0]}" if near else ""
        raise QuantError(
            f"config: the pattern {hint.pattern!r} matches none of the {len(shapes)} tensors; "
            f"it must match a whole name{example}"
        )
    if not weights:
        raise QuantError(
            f"config: the pattern {hint.pattern!r} matches biases only, which stay in float"
        )
    return weights


def _fitted(
    name: str, source: str, wanted: str, shape: Sequence[int] | None, fallback: str | None
) -> Target:
    if wanted == PLAIN:
        return Target(name, source, PLAIN, None if shape is None else tuple(shape))
    if shape is None:
        raise QuantError(
            f"{source}: its file stores no shapes, and {wanted} needs to know where rows end; "
            "give the model that it is of"
        )
    width = shape[-1] if shape else 1
    if divides(wanted, width):
        return Target(name, source, wanted, tuple(shape))
    if fallback is not None and divides(fallback, width):
        return Target(name, source, fallback, tuple(shape), instead_of=wanted)
    refused = f", and {fallback} has blocks of {_block(fallback)}" if fallback else ""
    raise QuantError(
        f"{source}: rows of {width} weights do not divide into {wanted} blocks of "
        f"{_block(wanted)}{refused}; set `fallback` to a type that fits, such as "
        f"{'Q8_0' if width % _block('Q8_0') == 0 else PLAIN}"
    )


def divides(type_name: str, width: int) -> bool:
    """Do rows of `width` weights divide into blocks of this type? F32 always fits."""
    return width % _block(type_name) == 0


def _block(type_name: str) -> int:
    if type_name.startswith(PACKED):
        return kleidiai.BLOCK
    return 1 if type_name == PLAIN else BLOCKS[type_name].weights
