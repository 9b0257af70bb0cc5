"""The promises of rule `rotated-embedding`, with rotations given as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from buildsys.errors import StepError
from buildsys.formats.errors import FormatError
from buildsys.rules.spec import Input

# The vendor writes TorchScript, deprecated or not.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
HIDDEN, VOCAB = 64, 300
KEY = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


def orthogonal(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def vendor_file(path: Path, R: torch.Tensor) -> Path:
    """What `torch::save(tensor)` writes, as Mobilint's reader sees it: one tensor called "0"."""
    holder = nn.Module()
    holder.register_parameter("0", nn.Parameter(R, requires_grad=False))
    torch.jit.script(holder).save(str(path))
    return path


def test_it_is_the_vendors_product(make: Callable[..., Any], folder: Path, tmp_path: Path):
    path = vendor_file(tmp_path / "global_rotation.pth", orthogonal(HIDDEN))
    rotation = Input("r", "artifact", {"path": path}, "b3:1234")
    options = {"embedding_key": KEY}
    inputs = {"model": folder, "rotation": rotation}
    made = make("rotated-embedding", "m.safetensors", inputs, options)
    found = load_file(made.out)
    assert list(found) == [KEY]
    E = load_file(folder / "model.safetensors")[KEY]
    # The vendor's own reader and its one line of arithmetic.
    R = torch.jit.load(str(path), map_location="cpu").state_dict()["0"]
    expected = (E.double() @ R).float()
    assert found[KEY].dtype == torch.float32
    torch.testing.assert_close(found[KEY], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[KEY].norm(dim=1), E.float().norm(dim=1))
    recovered = torch.linalg.lstsq(E.double(), found[KEY].double()).solution
    torch.testing.assert_close(recovered, R, rtol=0, atol=1e-5)
    with safe_open(made.out, "pt") as file:
        assert file.metadata() == {"format": "pt", "rotation": "b3:1234"}
    assert made.notes["rotation"] == {"digest": "b3:1234", "format": "torchscript", "size": HIDDEN}


def test_the_key_is_the_one_that_both_transformers_find(
    make: Callable[..., Any], folder: Path, tmp_path: Path
):
    torch.save({"R": orthogonal(HIDDEN), "R_v": []}, tmp_path / "R.bin")
    key = "model.language_model.embed_tokens.weight"
    made = make(
        "rotated-embedding",
        "m.safetensors",
        {"model": folder, "rotation": tmp_path / "R.bin"},
    )
    E = load_file(folder / "model.safetensors")[KEY]
    expected = (E.double() @ orthogonal(HIDDEN)).float()
    torch.testing.assert_close(load_file(made.out)[key], expected, rtol=0, atol=1e-6)


def test_what_is_no_rotation_of_this_model_is_refused(
    make: Callable[..., Any], folder: Path, tmp_path: Path
):
    small = vendor_file(tmp_path / "small.pth", orthogonal(HIDDEN // 2))
    with pytest.raises(StepError, match="R is 32 x 32, the embedding has 64 columns"):
        make("rotated-embedding", "m.safetensors", {"model": folder, "rotation": small})
    bent = vendor_file(tmp_path / "bent.pth", orthogonal(HIDDEN) * 1.01)
    with pytest.raises(FormatError, match="not orthogonal"):
        make("rotated-embedding", "m.safetensors", {"model": folder, "rotation": bent})
