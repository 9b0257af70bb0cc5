"""The model: Qwen2-VL's architecture at a few megabytes, and its classic folder on disk."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from training.tokenizer import save_tokenizer, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATCH, MERGE = 14, 2
# CLIP's statistics, which Qwen2-VL's processor uses.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
StateDict = dict[str, torch.Tensor]


def classic_config(tokenizer: "Tokenizer", dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the layout that Qwen2-VL checkpoints have on the hub."""

    def token(name: str) -> int:
        return special_id(tokenizer, name)

    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": 256,
        "image_token_id": token("<|image_pad|>"),
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [8, 12, 12], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "depth": 2,
            "embed_dim": 160,
            "hidden_act": "quick_gelu",
            "hidden_size": 256,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": 4,
            "model_type": "qwen2_vl",
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "vocab_size": tokenizer.get_vocab_size(),
    }


def new_model(config: dict[str, Any], seed: int) -> Qwen2VLForConditionalGeneration:
    """A randomly initialised float32 model; q, k, v biases start small, not at zero.

    Matrices start at 1/sqrt(fan_in), those that write to a residual stream at half of it: a
    model this narrow learns slowly from transformers' 0.02.
    """
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config)).float()
    model.set_attn_implementation("eager")  # faster than the fused kernel in training on CPUs
    writers = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim >= 2:
            scale = 0.5 if name.endswith(writers) else 1.0
            torch.nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)
        elif name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            torch.nn.init.normal_(parameter, std=0.02)
    model.model.language_model.norm.weight.requires_grad_(False)
    return model


def classic_state(model: Qwen2VLForConditionalGeneration) -> StateDict:
    """Weights under classic names (`model.*`, `visual.*`); the tied head is left out."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[name] = tensor.detach().clone().contiguous()
    return state


def load_classic_state(model: Qwen2VLForConditionalGeneration, state: StateDict) -> None:
    """Load weights with classic names into a model of transformers 5, tied head included."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            renamed["model." + name] = tensor
        else:
            renamed["model.language_model." + name.removeprefix("model.")] = tensor
    renamed["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(renamed)


def save_folder(
    folder: Path, config: dict[str, Any], state: StateDict, tokenizer: "Tokenizer"
) -> None:
    """Write the model folder: config, weights in the config's dtype, tokenizer, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config["torch_dtype"])
    weights = {name: tensor.to(dtype) for name, tensor in sorted(state.items())}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["bos_token_id"],
    }
    preprocessor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": list(IMAGE_STD),
        "max_pixels": 168 * 168,
        "merge_size": MERGE,
        "min_pixels": 56 * 56,
        "patch_size": PATCH,
        "processor_class": "Qwen2VLProcessor",
        "temporal_patch_size": 2,
    }
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", preprocessor),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_folder(folder: Path) -> StateDict:
    """The weights of a model folder under classic names, in their stored dtype."""
    state: StateDict = load_file(folder / "model.safetensors")
    return state
