"""Tokenizer files for mllm: what its runtime indexes by id must be there, in its layout."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from buildsys.formats.errors import FormatError
from buildsys.formats.mllm_tokenizer import read_mllm_vocabulary, save_merges, save_vocabulary

TEXT = ["the quick brown fox jumps over the lazy dog", "größer als 9 Äpfel", "the fox, the dog"]


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer as the `tokenizers` library itself trains and saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def edited(path: Path, **model: object) -> Path:
    content = json.loads(path.read_text())
    content["model"].update(model)
    path.write_text(json.dumps(content))
    return path


def test_every_id_has_the_token_that_tokenizers_gives_it(
    tokenizer_json: Path, tmp_path: Path
) -> None:
    count = save_vocabulary(tmp_path / "vocab.mllm", tokenizer_json)
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    assert count == tokenizer.get_vocab_size(with_added_tokens=True)
    read = read_mllm_vocabulary(tmp_path / "vocab.mllm")
    assert sorted(number for _, number, _ in read) == list(range(count))
    assert all(tokenizer.id_to_token(number) == token for token, number, _ in read)
    assert all(score == float(number) for _, number, score in read)
    assert [token for token, _, _ in read][-2:] == ["<|im_start|>", "<|im_end|>"]


def test_layout_is_magic_count_and_packed_records(tmp_path: Path) -> None:
    vocab = {"a": 0, "Ġü": 1}
    content = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
    (tmp_path / "t.json").write_text(json.dumps(content))
    save_vocabulary(tmp_path / "v", tmp_path / "t.json")
    token = "Ġü".encode()
    expected = struct.pack("<iiii1sf", 23333, 2, 0, 1, b"a", 0.0)
    expected += struct.pack(f"<ii{len(token)}sf", 1, len(token), token, 1.0)
    assert (tmp_path / "v").read_bytes() == expected


def test_merges_of_both_spellings_are_written_alike(tokenizer_json: Path, tmp_path: Path) -> None:
    merges = json.loads(tokenizer_json.read_text())["model"]["merges"]
    assert all(isinstance(merge, list) for merge in merges), "tokenizers no longer writes pairs"
    count = save_merges(tmp_path / "pairs.txt", tokenizer_json)
    edited(tokenizer_json, merges=[" ".join(merge) for merge in merges])
    save_merges(tmp_path / "strings.txt", tokenizer_json)
    assert (tmp_path / "pairs.txt").read_bytes() == (tmp_path / "strings.txt").read_bytes()
    lines = (tmp_path / "pairs.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ") for line in lines] == merges
    assert count == len(merges)


def test_hole_in_the_ids_is_named(tokenizer_json: Path, tmp_path: Path) -> None:
    vocab = json.loads(tokenizer_json.read_text())["model"]["vocab"]
    gone = next(token for token, number in vocab.items() if number == 17)
    del vocab[gone]
    edited(tokenizer_json, vocab=vocab)
    with pytest.raises(FormatError, match="no token has id 17") as caught:
        save_vocabulary(tmp_path / "v", tokenizer_json)
    assert caught.value.remedy
    assert not (tmp_path / "v").exists()


def test_id_with_two_tokens_is_named(tokenizer_json: Path, tmp_path: Path) -> None:
    content = json.loads(tokenizer_json.read_text())
    content["added_tokens"].append({"id": 5, "content": "<|clash|>"})
    tokenizer_json.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"id 5 is both .* and '<\|clash\|>'"):
        save_vocabulary(tmp_path / "v", tokenizer_json)


def test_tokenizer_that_is_not_bpe_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    edited(tokenizer_json, type="WordPiece")
    with pytest.raises(FormatError, match=r"model\.type.*'WordPiece', not BPE"):
        save_vocabulary(tmp_path / "v", tokenizer_json)


@pytest.mark.parametrize("merge", ["a", "a b c", ["a"], ["a", "b c"], ["a", 3], ["a", "b\n"], 7])
def test_merge_that_a_line_cannot_hold_is_named(
    tokenizer_json: Path, tmp_path: Path, merge: object
) -> None:
    edited(tokenizer_json, merges=[["t", "h"], merge])
    with pytest.raises(FormatError, match=r"model\.merges\[1\]"):
        save_merges(tmp_path / "m", tokenizer_json)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": {"type": "BPE"}}', "{"])
def test_file_that_is_no_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    for save in (save_vocabulary, save_merges):
        with pytest.raises(FormatError):
            save(tmp_path / "out", tmp_path / "t.json")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, min_size=1))
@settings(deadline=None, max_examples=40)
def test_any_tokens_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("v")
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "t.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    save_vocabulary(folder / "v", folder / "t.json")
    read = read_mllm_vocabulary(folder / "v")
    assert read == [(token, number, float(number)) for number, token in enumerate(tokens)]
    (folder / "v").write_bytes((folder / "v").read_bytes()[:-1])
    with pytest.raises(FormatError, match="damaged after token"):
        read_mllm_vocabulary(folder / "v")
