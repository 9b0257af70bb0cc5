"""config.json in every layout gives one description; what is wrong is told by its field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from buildsys.formats.errors import FormatError
from buildsys.models.config import ModelConfig, read_model_config
from tests import tiny_models


def test_nested_and_flat_configs_describe_the_same_model(
    qwen2vl_folder: Path, tmp_path: Path
) -> None:
    flat = tiny_models.classic_folder(qwen2vl_folder, tmp_path / "classic")
    assert "text_config" in json.loads((qwen2vl_folder / "config.json").read_text())
    assert "text_config" not in json.loads((flat / "config.json").read_text())
    assert _comparable(read_model_config(qwen2vl_folder)) == _comparable(read_model_config(flat))


def test_head_dim_of_the_config_wins_over_the_quotient(qwen2_folder: Path, tmp_path: Path) -> None:
    assert read_model_config(qwen2_folder).head_dim == 16
    assert read_model_config(_changed(qwen2_folder, tmp_path, head_dim=32)).head_dim == 32


def test_tying_is_read_where_transformers_4_and_5_put_it(
    qwen2vl_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((qwen2vl_folder / "config.json").read_text())
    del content["tie_word_embeddings"]
    content["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_model_config(tmp_path).tie_word_embeddings


@pytest.mark.parametrize("value", [None, "64", -1, 0, 2.5, True])
def test_an_impossible_size_is_told_by_its_field(
    qwen2_folder: Path, tmp_path: Path, value: object
) -> None:
    folder = _changed(qwen2_folder, tmp_path, hidden_size=value)
    with pytest.raises(FormatError, match=r"config\.json: error: field 'hidden_size'"):
        read_model_config(folder)


def test_a_folder_without_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json.*No such file"):
        read_model_config(tmp_path)


def _changed(folder: Path, target: Path, **fields: object) -> Path:
    content = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **fields}))
    return target


def _comparable(config: ModelConfig) -> ModelConfig:
    return replace(config, raw={}, file=Path())
