"""A GGUF of a Llama or a Qwen2 as a Qwen2 checkpoint: names, config.json and tokenizer.json.

Qwen2 is Llama with biases on q, k and v: a Llama is written with zero biases. GGUF files of
Llamas hold q and k with the rows of every head reordered for another form of RoPE; those are
put back. transformers gives every model of type qwen2 the pre-tokenizer and the normalizer of
Qwen2, whatever tokenizer.json says, so that is what is written into it: all readers then agree.
Source: llama.cpp, convert_hf_to_gguf (LlamaModel.permute) and gguf-py's tensor names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buildsys.formats.errors import FormatError
from buildsys.formats.gguf_file import GGUFSource
from buildsys.formats.tensors import row_parts
from buildsys.models.family import Family

ARCHITECTURES = ("llama", "qwen2")
MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GLOBALS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Qwen2's split of a text into words before BPE; also transformers' for every qwen2 model.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # gguf's TokenType


@dataclass(frozen=True)
class HeadOrder:
    """How many heads a q or k projection has, whose rows llama.cpp reordered."""

    heads: int


def config_of(source: GGUFSource) -> dict[str, Any]:
    """config.json of a Qwen2ForCausalLM. Raises FormatError naming the metadata field."""
    arch = _value(source, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise _wrong(
            source, "general.architecture", f"is {arch!r}", f"Read are {', '.join(ARCHITECTURES)}."
        )
    hidden = _value(source, f"{arch}.embedding_length", int)
    heads = _value(source, f"{arch}.attention.head_count", int)
    head_dim = hidden // heads
    for field in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if source.metadata.get(f"{arch}.{field}", head_dim) != head_dim:
            raise _wrong(source, f"{arch}.{field}", f"is not {head_dim}, hidden size by heads")
    if source.metadata.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise _wrong(source, f"{arch}.rope.scaling.type", "is set: Qwen2 here has plain RoPE")
    layers = _value(source, f"{arch}.block_count", int)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": source.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.metadata.get("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": _value(source, f"{arch}.feed_forward_length", int),
        "max_position_embeddings": _value(source, f"{arch}.context_length", int),
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": source.metadata.get(f"{arch}.attention.head_count_kv", heads),
        "rms_norm_eps": _float32(source, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _float32(source, f"{arch}.rope.freq_base", 10000.0),
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in source.names(),
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(_value(source, "tokenizer.ggml.tokens", list)),
    }


def checkpoint_names(source: GGUFSource) -> dict[str, str]:
    """Name in the checkpoint -> name in the GGUF. Raises FormatError for what Qwen2 lacks."""
    names: dict[str, str] = {}
    for name in source.names():
        match = LAYER.fullmatch(name)
        if name in GLOBALS:
            names[GLOBALS[name]] = name
        elif match is not None and match[2] in MODULES:
            names[f"model.layers.{match[1]}.{MODULES[match[2]]}.{match[3]}"] = name
        else:
            remedy = "Only plain Llama and Qwen2 models are read (no rope_freqs, no experts)."
            raise FormatError(
                "has no place in a Qwen2", file=source.path, tensor=name, remedy=remedy
            )
    return names


def check_shapes(source: GGUFSource, names: Mapping[str, str], family: Family) -> None:
    """Raises FormatError, naming the tensor, for one that is missing or of the wrong shape.

    Biases may be missing: a Llama has none.
    """
    for name, shape in family.shapes.items():
        if name not in names:
            if name.endswith(".bias") or (family.tied and name == family.head.weight_name):
                continue
            raise FormatError("is missing", file=source.path, tensor=name)
        if source.shape(names[name]) != shape:
            message = f"has shape {list(source.shape(names[name]))}, its metadata say {list(shape)}"
            raise FormatError(message, file=source.path, tensor=names[name])
    for name in names:
        if name not in family.shapes:
            raise FormatError("has no place in a Qwen2", file=source.path, tensor=names[name])


def head_order(name: str, config: Mapping[str, Any], source: GGUFSource) -> HeadOrder | None:
    """Are the rows of this tensor of the checkpoint reordered in the GGUF?"""
    if source.metadata["general.architecture"] != "llama":
        return None
    for kind, field in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{kind}." in name:
            return HeadOrder(config[field])
    return None


def parts_of(source: GGUFSource, name: str, order: HeadOrder | None) -> Iterator[Tensor]:
    """The tensor in float32, part by part along its first axis, heads in their first order."""
    shape = source.shape(name)
    if order is None:
        for start, stop in row_parts(shape, torch.float32.itemsize):
            yield source.rows(name, start, stop).to(torch.float32)
        return
    rows = shape[0] // order.heads
    for head in range(order.heads):
        part = source.rows(name, head * rows, (head + 1) * rows).to(torch.float32)
        pairs = part.reshape(rows // 2, 2, *shape[1:])
        yield pairs.transpose(0, 1).reshape(part.shape).contiguous()


def tokenizer_of(source: GGUFSource) -> str:
    """tokenizer.json with Qwen2's pre-tokenizer. Raises FormatError where it is no BPE of bytes."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    kind = _value(source, "tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise _wrong(source, "tokenizer.ggml.model", f"is {kind!r}, not 'gpt2' (BPE of bytes)")
    tokens = _value(source, "tokenizer.ggml.tokens", list)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _wrong(source, "tokenizer.ggml.tokens", "has a token twice")
    merges = [tuple(pair.split(" ")) for pair in _value(source, "tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, symbols])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    types = source.metadata.get("tokenizer.ggml.token_type")
    for token, type_ in zip(tokens, types if isinstance(types, list) else [], strict=False):
        if type_ in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=type_ == CONTROL, normalized=False)])
    return str(tokenizer.to_str(pretty=True))


def tokenizer_config_of(source: GGUFSource) -> str:
    """tokenizer_config.json: special tokens by name, and the chat template."""
    tokens = _value(source, "tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(
            source, f"{source.metadata['general.architecture']}.context_length", int
        ),
        "tokenizer_class": "Qwen2Tokenizer",
    }
    for field, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        number = source.metadata.get(f"tokenizer.ggml.{field}_token_id")
        if isinstance(number, int):
            config[f"{key}_token"] = tokens[number]
    template = source.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _value(source: GGUFSource, field: str, kind: type) -> Any:
    value = source.metadata.get(field)
    if not isinstance(value, kind):
        raise _wrong(source, field, "is missing" if value is None else f"is {value!r}")
    return value


def _float32(source: GGUFSource, field: str, default: float | None = None) -> float:
    """GGUF holds float32; the shortest decimal that is the same float32 is what was meant."""
    import numpy as np

    value = source.metadata.get(field, default)
    if not isinstance(value, float):
        raise _wrong(source, field, "is missing" if value is None else f"is {value!r}")
    return float(str(np.float32(value)))


def _wrong(source: GGUFSource, field: str, message: str, remedy: str | None = None) -> FormatError:
    return FormatError(message, file=source.path, field=field, remedy=remedy)
