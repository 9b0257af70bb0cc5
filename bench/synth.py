"""Writes a checkpoint with the true shapes of a published model and random weights.

    python bench/synth.py FOLDER [--shape qwen2-vl-2b] [--layers N] [--blocks N] [--seed 0]

bfloat16, in shards of about 1 GiB with an index, one tensor in memory at a time; config.json in
the hub's layout, a tokenizer of single bytes, a chat template and an image processor, so that
every rule can read it. --layers and --blocks cut the language model and the vision tower.
Matrices are normal with variance 1 / inputs, so that activations stay finite at any depth.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildsys.formats.safetensors_file import SafetensorsWriter
from buildsys.formats.tensors import TensorEntry
from buildsys.models.config import read_model_config
from buildsys.models.family import Family, Linear
from buildsys.models.open import describe

SHARD_BYTES = 2**30
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
FIRST_SPECIAL = 256  # after the single bytes
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {
        "model_type": "qwen2",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "qwen2-vl-2b": {
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": FIRST_SPECIAL + SPECIAL_TOKENS.index("<|image_pad|>"),
        "video_token_id": FIRST_SPECIAL + SPECIAL_TOKENS.index("<|video_pad|>"),
        "vision_start_token_id": FIRST_SPECIAL + SPECIAL_TOKENS.index("<|vision_start|>"),
        "vision_end_token_id": FIRST_SPECIAL + SPECIAL_TOKENS.index("<|vision_end|>"),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 32,
            "embed_dim": 1280,
            "num_heads": 16,
            "mlp_ratio": 4,
            "hidden_size": 1536,
            "in_channels": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def write_checkpoint(
    folder: Path, shape: str, *, layers: int | None = None, blocks: int | None = None, seed: int = 0
) -> None:
    """Write config, weights, tokenizer and processor into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(SHAPES[shape]) | {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config |= {} if layers is None else {"num_hidden_layers": layers}
    if blocks is not None and "vision_config" in config:
        config["vision_config"] = {**config["vision_config"], "depth": blocks}
    _write_json(folder / "config.json", config)
    _write_weights(folder, describe(read_model_config(folder)), seed)
    _write_tokenizer(folder)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 1280 * 28 * 28,
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
        },
    )


def _write_weights(folder: Path, family: Family, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(family))
    files: dict[str, str] = {}
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        entries = [TensorEntry(name, torch.bfloat16, family.shapes[name]) for name in names]
        with SafetensorsWriter(folder / file, entries, {"format": "pt"}) as writer:
            for entry in entries:
                writer.write(entry.name, _random(entry.name, entry.shape, family, generator))
                files[entry.name] = file
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _shards(family: Family) -> Iterator[list[str]]:
    """Names in state-dict order, about SHARD_BYTES together; a tied head is not stored."""
    names: list[str] = []
    nbytes = 0
    for name, shape in family.shapes.items():
        if family.tied and name == family.head.weight_name:
            continue
        size = math.prod(shape) * torch.bfloat16.itemsize
        if names and nbytes + size > SHARD_BYTES:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += size
    yield names


def _random(
    name: str, shape: tuple[int, ...], family: Family, generator: torch.Generator
) -> Tensor:
    owner, _, part = name.rpartition(".")
    noise = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    if owner in family.norms:
        return 1 + noise / 10 if part == "weight" else noise / 10
    if isinstance(family.linears.get(owner), Linear) and part == "bias":
        return noise / 10
    return noise / math.sqrt(math.prod(shape[1:]))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-vl-2b")
    parser.add_argument("--layers", type=int, help="layers of the language model")
    parser.add_argument("--blocks", type=int, help="blocks of the vision tower")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(
        args.folder, args.shape, layers=args.layers, blocks=args.blocks, seed=args.seed
    )


if __name__ == "__main__":
    main()
