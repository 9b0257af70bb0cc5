"""Writes a Qwen2 of one layer with random weights, for the self-test: `small_model.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import numpy

HIDDEN, HEADS, INNER, WORDS = 128, 2, 256, 64
CONFIG = {
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    layer, narrow = "model.layers.0.", HIDDEN // HEADS
    yield "model.embed_tokens.weight", (WORDS, HIDDEN)
    for name, out in (("q", HIDDEN), ("k", narrow), ("v", narrow)):
        yield f"{layer}self_attn.{name}_proj.weight", (out, HIDDEN)
        yield f"{layer}self_attn.{name}_proj.bias", (out,)
    yield f"{layer}self_attn.o_proj.weight", (HIDDEN, HIDDEN)
    yield f"{layer}mlp.gate_proj.weight", (INNER, HIDDEN)
    yield f"{layer}mlp.up_proj.weight", (INNER, HIDDEN)
    yield f"{layer}mlp.down_proj.weight", (HIDDEN, INNER)
    for norm in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        yield f"{norm}.weight", (HIDDEN,)
    yield "lm_head.weight", (WORDS, HIDDEN)


def main(folder: str) -> None:
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(CONFIG, file)
    random = numpy.random.default_rng(0)
    header, payload = {}, b""
    for name, shape in shapes():
        bits = (random.standard_normal(shape, "f4") * 0.1).view("u4") >> 16
        data = bits.astype("u2").tobytes()
        place = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": place}
        payload += data
    text = json.dumps(header).encode()
    with open(os.path.join(folder, "model.safetensors"), "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + payload)


if __name__ == "__main__":
    main(sys.argv[1])
