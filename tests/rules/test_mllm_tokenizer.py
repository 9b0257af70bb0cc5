"""The promise of rule `mllm-tokenizer`: both files say what tokenizer.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from buildsys.formats.errors import FormatError
from buildsys.formats.mllm_tokenizer import read_mllm_vocabulary


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox, the lazy dog"] * 3, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_files_agree_with_the_tokenizer(make: Callable[..., Any], trained: Path):
    made = make("mllm-tokenizer", "vocab.mllm", {"model": trained})
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    found = read_mllm_vocabulary(made.out)
    assert {token: number for token, number, _ in found} == tokenizer.get_vocab()
    assert [score for *_, score in found] == [float(number) for _, number, _ in found]
    lines = made.output("merges").read_text(encoding="utf-8").splitlines()
    merges = json.loads((trained / "tokenizer.json").read_text())["model"]["merges"]
    assert lines == [" ".join(merge) for merge in merges]
    assert made.notes == {"tokens": tokenizer.get_vocab_size(), "merges": len(lines)}


def test_a_hole_in_the_ids_is_an_error(make: Callable[..., Any], trained: Path):
    content = json.loads((trained / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] += 2
    (trained / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="no token has id"):
        make("mllm-tokenizer", "vocab.mllm", {"model": trained})
