"""A model folder is refused, by the name of what is wrong, before hours are spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from buildsys.errors import is_for_people
from buildsys.formats.errors import FormatError
from buildsys.models.errors import ModelError
from buildsys.models.open import open_model
from tests import tiny_models

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(qwen2_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(qwen2_folder, tmp_path / "model")


def test_the_description_is_the_real_models_state_dict(golden_folder: Path) -> None:
    for name in ("mllm_qwen2_tiny", "mllm_qwen2vl_tiny"):
        model = open_model(golden_folder / name)
        stored = tiny_models.weights_of(golden_folder / name)
        assert {n: model.tensors.shape(n) for n in model.tensors.names()} == {
            n: tuple(t.shape) for n, t in stored.items()
        }


@pytest.mark.parametrize("make", [tiny_models.new_qwen2, tiny_models.new_qwen2vl])
def test_tensors_stand_in_the_order_of_transformers_state_dict(make, tmp_path: Path) -> None:
    module = make()
    model = open_model(tiny_models.save_model(module, tmp_path))
    order = [
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        for name in module.state_dict()
    ]
    assert list(model.family.shapes) == order


def test_key_layouts_give_equal_tensors(qwen2vl_folder: Path, tmp_path: Path) -> None:
    classic = open_model(tiny_models.classic_folder(qwen2vl_folder, tmp_path / "classic")).tensors
    modern = open_model(tiny_models.transformers_keys(qwen2vl_folder, tmp_path / "modern")).tensors
    assert list(classic.names()) == list(modern.names())
    assert all(torch.equal(classic.read(name), modern.read(name)) for name in classic.names())


def test_an_unsupported_model_type_names_the_supported_ones(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "mamba"}))
    with pytest.raises(ModelError, match=r"'model_type': 'mamba'.*\n.*qwen2, qwen2_vl") as caught:
        open_model(folder)
    assert is_for_people(caught.value)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    weights = tiny_models.weights_of(folder)
    del weights[Q_PROJ]
    tiny_models.rewrite(folder, weights)
    with pytest.raises(ModelError, match=f"'{Q_PROJ}': is missing"):
        open_model(folder)


def test_a_layer_that_config_json_lacks_is_never_left_out(folder: Path) -> None:
    weights = tiny_models.weights_of(folder)
    extra = "model.layers.7.mlp.up_proj.weight"
    tiny_models.rewrite(folder, {**weights, extra: torch.zeros(4, 4)})
    with pytest.raises(ModelError, match=f"'{extra}': is of a layer beyond the "):
        open_model(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    weights = tiny_models.weights_of(folder)
    tiny_models.rewrite(folder, {**weights, Q_PROJ: torch.zeros(64, 60)})
    with pytest.raises(ModelError, match=rf"'{Q_PROJ}': has shape \[64, 60\].*\[64, 64\]"):
        open_model(folder)


def test_a_quantized_weight_is_refused(folder: Path) -> None:
    weights = tiny_models.weights_of(folder)
    tiny_models.rewrite(folder, {**weights, Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)})
    with pytest.raises(ModelError, match=f"'{Q_PROJ}': has type I8"):
        open_model(folder)


def test_a_truncated_file_names_the_tensor_that_it_damages(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors: error: tensor '.*': its data ends"):
        open_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_told_when_they_are_read(folder: Path, value: float) -> None:
    weights = tiny_models.weights_of(folder)
    weights[Q_PROJ][3, 5] = value
    tiny_models.rewrite(folder, weights)
    tensors = open_model(folder).tensors
    with pytest.raises(FormatError, match=f"'{Q_PROJ}': holds"):
        tensors.read(Q_PROJ)
    with pytest.raises(FormatError, match=f"'{Q_PROJ}': holds"):
        tensors.rows(Q_PROJ, 2, 4)


def test_a_stored_copy_of_a_tied_head_is_left_out(qwen2vl_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2vl_folder, tmp_path / "model")
    weights = tiny_models.weights_of(folder)
    embedding = weights["model.embed_tokens.weight"]
    tiny_models.rewrite(folder, {**weights, "lm_head.weight": embedding.clone()})
    assert "lm_head.weight" not in open_model(folder).tensors.names()
