"""Random models of the real classes, small enough for every test, with nothing left at 0 or 1.

`save_pretrained` writes transformers 5's config layout (nested `text_config`); `classic_folder`
makes the layout of the hub's Qwen2-VL checkpoints from it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_SPECIAL = 256
VOCAB_SIZE = FIRST_SPECIAL + len(SPECIAL_TOKENS)
IMAGE_TOKEN = FIRST_SPECIAL + SPECIAL_TOKENS.index("<|image_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def new_qwen2(**changes: Any) -> nn.Module:
    """Qwen2, 2 layers, hidden 64, 4 heads on 2 kv heads, head_dim 16, untied unless told."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": dict(ROPE),
        **SPECIAL_IDS,
        **changes,
    }
    return _randomised(Qwen2ForCausalLM(Qwen2Config(**fields)))


def new_qwen2vl(tied: bool = True) -> nn.Module:
    """Qwen2-VL, the same language model, and a ViT of 2 blocks, embed 80, 2 heads of 40."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]},
        **SPECIAL_IDS,
    }
    vision = {"depth": 2, "embed_dim": 80, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=FIRST_SPECIAL + 3,
        vision_end_token_id=FIRST_SPECIAL + 4,
        tie_word_embeddings=tied,
    )
    return _randomised(Qwen2VLForConditionalGeneration(config))


def new_qwen2_5_vl() -> nn.Module:
    """Qwen2.5-VL: windows of 2 x 2 merged patches in block 0, the whole image in block 1."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]},
        **SPECIAL_IDS,
    }
    vision = {
        "depth": 2,
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=FIRST_SPECIAL + 3,
        vision_end_token_id=FIRST_SPECIAL + 4,
        tie_word_embeddings=False,
    )
    return _randomised(Qwen2_5_VLForConditionalGeneration(config))


def new_decoder(kind: str, **changes: Any) -> nn.Module:
    """A "Qwen3", "Llama" or "Qwen2" of 2 layers, hidden 64, 4 heads on 2 kv heads; Qwen3's heads
    are wider than hidden / heads, as in the real ones."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if kind == "Qwen3" else 16,
        "max_position_embeddings": 512,
        "rope_parameters": dict(ROPE),
        **SPECIAL_IDS,
        **changes,
    }
    config = getattr(transformers, f"{kind}Config")(**fields)
    return _randomised(getattr(transformers, f"{kind}ForCausalLM")(config))


def save_model(model: nn.Module, folder: Path, **how: Any) -> Path:
    """Write a model as transformers does, with tokenizer, chat template and processor."""
    pretrained: Any = model
    pretrained.save_pretrained(folder, **how)
    save_tokenizer(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: one token per byte, then the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids are the bytes of an ASCII text."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE({_letter_of(byte): byte for byte in range(128)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def _letter_of(byte: int) -> str:
    """GPT-2's byte alphabet: what has no glyph of its own is moved up to 256 and beyond."""
    if 33 <= byte <= 126:
        return chr(byte)
    return chr(256 + (byte if byte < 33 else byte - 127 + 33))


def classic_folder(folder: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A copy with the hub's layouts: flat config, classic keys, no tied head."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    text = config.pop("text_config", {})
    rope = text.pop("rope_parameters", {})
    flat = {**text, **config, "rope_theta": rope.get("rope_theta", 10000.0)}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope.get("mrope_section")}
    flat["vision_config"].pop("rope_parameters", None)
    flat["vision_config"]["model_type"] = "qwen2_vl"
    (target / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    rewrite(target, {name: t.to(dtype) for name, t in weights_of(folder).items()})
    return target


def transformers_keys(folder: Path, target: Path) -> Path:
    """A copy whose keys are those of transformers 5's modules (`model.language_model.*`)."""
    shutil.copytree(folder, target)
    renamed = {}
    for name, tensor in weights_of(folder).items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        renamed[name] = tensor
    rewrite(target, renamed)
    return target


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder with one safetensors file."""
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Replace the folder's weights."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _randomised(model: nn.Module) -> nn.Module:
    """Weights large enough to matter, biases and norm gains that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        gain = parameter.ndim == 1 and name.endswith("weight")
        width = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
        parameter.data = (
            1.0 + 0.3 * noise if gain else noise * (1.5 / width**0.5 if width > 1 else 0.2)
        )
    return model.eval()
