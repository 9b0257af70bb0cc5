"""The deploy folder: complete, or refused with the two parts that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from buildsys.errors import StepError

KEY = "model.language_model.embed_tokens.weight"


@pytest.fixture
def parts(tmp_path: Path, qwen2vl_folder: Path) -> dict[str, Path]:
    config = {
        "vocab_size": 20,
        "hidden_size": 8,
        "mxq_path": "t.mxq",
        "vision_config": {"mxq_path": "v.mxq"},
        "qbuild": {"rotation": "abc"},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    (tmp_path / "t.mxq").write_bytes(b"text")
    (tmp_path / "v.mxq").write_bytes(b"vision")
    embed(tmp_path / "e.safetensors", "abc")
    return {
        "model": qwen2vl_folder,
        "text": tmp_path / "t.mxq",
        "vision": tmp_path / "v.mxq",
        "config": tmp_path / "c.json",
        "embedding": tmp_path / "e.safetensors",
    }


def embed(path: Path, rotation: str, rows: int = 20, key: str = KEY) -> None:
    metadata = {"format": "pt", "rotation": rotation}
    save_file({key: torch.zeros(rows, 8)}, path, metadata=metadata)


def test_it_holds_the_four_files_and_those_of_tokenizer_and_processor(
    make: Any, parts: dict[str, Path]
) -> None:
    made = make("mobilint-model", "deploy", parts)
    assert {each.name for each in made.out.iterdir()} >= {
        "t.mxq", "v.mxq", "config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
    }  # fmt: skip
    assert (made.out / "v.mxq").read_bytes() == b"vision"
    assert (made.out / "config.json").read_bytes() == parts["config"].read_bytes()
    assert made.notes["rotation"] == {"digest": "abc"}


def test_an_embedding_of_another_rotation_is_refused(make: Any, parts: dict[str, Path]) -> None:
    embed(parts["embedding"], "def")
    with pytest.raises(StepError, match="two rotations: abc and def"):
        make("mobilint-model", "deploy", parts)


def test_an_embedding_of_another_model_is_refused(make: Any, parts: dict[str, Path]) -> None:
    embed(parts["embedding"], "abc", rows=21)
    with pytest.raises(StepError, match=r"is \[21, 8\], config.json says \[20, 8\]"):
        make("mobilint-model", "deploy", parts)
    embed(parts["embedding"], "abc", key="lm_head.weight")
    with pytest.raises(StepError, match=r"the client reads model\.language_model"):
        make("mobilint-model", "deploy", parts)


def test_a_config_that_names_another_mxq_is_refused(
    make: Any, parts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "old.mxq").write_bytes(b"text")
    with pytest.raises(StepError, match=r"names t\.mxq as the text mxq, which is old\.mxq here"):
        make("mobilint-model", "deploy", {**parts, "text": tmp_path / "old.mxq"})


def test_a_model_without_a_tokenizer_is_refused(
    make: Any, parts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(StepError, match=r"there is no tokenizer\.json"):
        make("mobilint-model", "deploy", {**parts, "model": tmp_path / "bare"})
