"""config.json: each wrong or missing field is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buildsys.formats.config_file import ConfigFile, read_config
from buildsys.formats.errors import FormatError

FIELDS = {
    "hidden_size": 256,
    "rope_theta": 1e6,
    "eps": 1,
    "model_type": "qwen2_vl",
    "tie_word_embeddings": True,
    "sliding_window": None,
    "vision_config": {"depth": 2, "embed_dim": "160"},
}


@pytest.fixture
def config(tmp_path: Path) -> ConfigFile:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return read_config(tmp_path)


def test_fields_have_their_types(config: ConfigFile) -> None:
    assert config.integer("hidden_size") == 256
    assert config.number("rope_theta") == 1e6
    assert config.number("eps") == 1.0
    assert config.text("model_type") == "qwen2_vl"
    assert config.flag("tie_word_embeddings") is True
    assert config.section("vision_config").integer("depth") == 2


def test_null_counts_as_missing(config: ConfigFile) -> None:
    assert not config.has("sliding_window")
    assert config.integer("sliding_window", 7) == 7
    with pytest.raises(FormatError, match="'sliding_window': is missing"):
        config.integer("sliding_window")


def test_missing_field_names_its_section_and_the_nearest(config: ConfigFile) -> None:
    with pytest.raises(FormatError, match=r"'vision_config\.dept': is missing\n.*'depth'"):
        config.section("vision_config").integer("dept")


@pytest.mark.parametrize(
    ("getter", "field", "message"),
    [
        ("integer", "tie_word_embeddings", "is True, not an integer"),
        ("integer", "rope_theta", "not an integer"),
        ("number", "model_type", "is 'qwen2_vl', not a number"),
        ("number", "tie_word_embeddings", "not a number"),
        ("text", "hidden_size", "is 256, not a text"),
        ("flag", "hidden_size", "neither true nor false"),
        ("section", "hidden_size", "not an object"),
    ],
)
def test_field_of_another_type_is_told(
    config: ConfigFile, getter: str, field: str, message: str
) -> None:
    with pytest.raises(FormatError, match=f"config.json: error: field '{field}': .*{message}"):
        getattr(config, getter)(field)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', "line 2 column 6"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_not_json_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_config(tmp_path / "config.json")


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="is not JSON"):
        read_config(tmp_path)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_config(tmp_path)
