"""What rule bmodel says before the compiler starts, and the model that it lays out for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from buildsys.errors import StepError
from buildsys.rules.bmodel import check, check_groups
from buildsys.rules.sophgo.kernels import drop_old_nets, lend_kernels, net_store, take_kernels
from buildsys.rules.sophgo.model_folder import prepare
from buildsys.rules.sophgo.options import SCHEMA, arguments, image_size, known_arguments, problems
from tests import tiny_models
from tests.rules.plans import plan_of

TINY = Path(__file__).parents[2] / "recipes" / "assets" / "qwen2vl-tiny"
CONVERTER = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument('-s', '--seq_length', type=int, required=True)
parser.add_argument('-q', '--quantize', default="auto", choices=["auto", "bf16", "w4bf16"])
parser.add_argument('-g', "--q_group_size", default=64, type=int)
parser.add_argument('-c', '--chip', "--processor", choices=["bm1684x", "CHIP"])
parser.add_argument('--max_pixels', type=int)
parser.add_argument('--symmetric', action='store_true')
"""


def options(**changes: Any) -> dict[str, Any]:
    found = {name: each["default"] for name, each in SCHEMA.items() if "default" in each}
    return {**found, "seq_length": 512, "quantize": "bf16", **changes}


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("672,896", (672, 896)),
        ([672, 896], (672, 896)),
        (602112, (672, 896)),
        (784, (28, 28)),
        ("56, 84", (56, 84)),
        (7 * 784, (28, 196)),
    ],
)
def test_an_image_size_may_be_written_in_three_ways(value: Any, size: tuple[int, int]) -> None:
    assert image_size(value) == size
    assert size[0] * size[1] % (28 * 28) == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("768,768", "'756,756'"),
        (602113, "602112"),
        (1, "784"),
        ("672", "WIDTH,HEIGHT"),
        ("a,b", "WIDTH,HEIGHT"),
    ],
)
def test_an_impossible_image_size_is_told_with_the_nearest(value: Any, said: str) -> None:
    with pytest.raises(StepError) as caught:
        image_size(value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "outputs", "option"),
    [
        ({"max_input_length": 513}, {}, "max_input_length"),
        ({"max_input_length": 64, "use_history_kv": True}, {}, "max_input_length"),
        ({"num_core": 2}, {}, "num_core"),
        ({"embedding_disk": True}, {}, "embedding_disk"),
        ({"max_pixels": "768,768"}, {}, "max_pixels"),
    ],
)
def test_options_that_do_not_go_together_are_pointed_at(
    changes: dict[str, Any], outputs: dict[str, str], option: str
) -> None:
    assert [each.option for each in problems(options(**changes), outputs)] == [option]
    fine = options(num_core=2, chip="bm1688", embedding_disk=True, max_input_length=64)
    assert not list(problems(fine, {"config": "config/"}))


def test_the_weights_must_be_of_the_model_that_is_compiled() -> None:
    maker, _ = plan_of("r.safetensors", "rotated-checkpoint", model="other")
    step, plan = plan_of(
        "a.bmodel", "bmodel", maker, options=options(), model="model", checkpoint="r.safetensors"
    )
    (problem,) = check(step, plan)
    assert problem.input == "checkpoint"


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    path = tmp_path / "llm_convert.py"
    path.write_text(CONVERTER.replace("CHIP", "cv186x"))
    return path


def test_the_chip_is_called_what_the_installed_version_calls_it(converter: Path) -> None:
    known = known_arguments(converter)
    assert "cv186x" in arguments(options(chip="cv186ah"), known, "1")
    converter.write_text(CONVERTER.replace("CHIP", "cv186ah"))
    assert "cv186ah" in arguments(options(chip="cv186x"), known_arguments(converter), "1")


def test_the_words_for_the_converter(converter: Path) -> None:
    words = arguments(options(symmetric=True, max_pixels=602112), known_arguments(converter), "1")
    assert words == [
        "--seq_length", "512", "--quantize", "bf16", "--q_group_size", "64", "--chip", "bm1684x",
        "--max_pixels", "672,896", "--symmetric",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_history_kv": True}, "has no option use_history_kv"),
        ({"quantize": "w4f16"}, "knows no quantize w4f16"),
        ({"chip": "bm1688"}, "knows no chip bm1688"),
    ],
)
def test_what_the_installed_version_cannot_do_is_an_error(
    converter: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(StepError, match=said):
        arguments(options(**changes), known_arguments(converter), "1.21")


def laid_out(model: Path, quantize: str, target: Path, checkpoint: Path | None = None) -> Any:
    made = prepare(model, checkpoint, quantize, target, lambda done, total, unit: None)
    return made, json.loads((target / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_a_model_in_the_classic_layout_is_linked_as_it_is(tmp_path: Path) -> None:
    made, config = laid_out(TINY, "bf16", tmp_path / "out")
    assert not made.rewritten
    original = json.loads((TINY / "config.json").read_text())
    assert {name: config[name] for name in original} == original
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    assert weights.resolve() == (TINY / "model.safetensors").resolve()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_transformers_5_layout_becomes_the_classic_one(tmp_path: Path) -> None:
    """The same model in both layouts gives the same config and the same tensors."""
    config = json.loads((TINY / "config.json").read_text())
    text_fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                   "num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act")  # fmt: skip
    nested = {name: value for name, value in config.items() if name not in text_fields}
    section = nested.pop("rope_scaling")["mrope_section"]
    theta = nested.pop("rope_theta")
    nested["text_config"] = {
        **{name: config[name] for name in text_fields},
        "model_type": "qwen2_vl_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": theta,
            "mrope_section": section,
        },
    }
    nested["vision_config"] = {**config["vision_config"]}
    del nested["vision_config"]["in_chans"]
    nested["dtype"] = nested.pop("torch_dtype")
    folder = tiny_models.transformers_keys(TINY, tmp_path / "new")
    (folder / "config.json").write_text(json.dumps(nested))
    made, classic = laid_out(folder, "bf16", tmp_path / "out")
    assert made.rewritten
    for name in (*text_fields, "rope_theta", "model_type", "torch_dtype", "tie_word_embeddings"):
        assert classic[name] == config[name], name
    assert classic["rope_scaling"]["mrope_section"] == section
    assert classic["vision_config"]["in_chans"] == 3
    assert "text_config" not in classic
    own, other = tensors_of(TINY), tensors_of(tmp_path / "out")
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(
    ("stored", "quantize", "said"),
    [
        (torch.bfloat16, "w4f16", "Give `quantize: w4bf16`"),
        (torch.float16, "bf16", "Give `quantize: f16`"),
        (torch.bfloat16, "auto", "Say how it shall be quantized"),
        (torch.float32, "auto", "Say how it shall be quantized"),
    ],
)
def test_the_mode_must_be_of_the_checkpoints_type(
    stored: torch.dtype, quantize: str, said: str, tmp_path: Path
) -> None:
    model = tiny_models.save_model(tiny_models.new_qwen2().to(stored), tmp_path / "model")
    with pytest.raises(StepError) as caught:
        laid_out(model, quantize, tmp_path / "out")
    assert said in str(caught.value)


@pytest.mark.parametrize(("quantize", "dtype"), [("w4bf16", "bfloat16"), ("f16", "float16")])
def test_float32_is_not_rounded_before_the_compiler_does(
    qwen2_folder: Path, quantize: str, dtype: str, tmp_path: Path
) -> None:
    made, config = laid_out(qwen2_folder, quantize, tmp_path / "out")
    assert (made.stored, config["torch_dtype"]) == ("float32", dtype)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}


def test_a_checkpoint_replaces_the_weights_and_unties_the_head(tmp_path: Path) -> None:
    weights = tensors_of(TINY)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file({name: each.float() for name, each in weights.items()}, tmp_path / "r.safetensors")
    made, config = laid_out(TINY, "w4bf16", tmp_path / "out", tmp_path / "r.safetensors")
    assert json.loads((TINY / "config.json").read_text())["tie_word_embeddings"] is True
    assert config["tie_word_embeddings"] is False
    assert made.has_vision
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"].float())


def test_a_vision_tower_for_rmsnorm_is_refused(tmp_path: Path) -> None:
    weights = {
        name: each
        for name, each in tensors_of(TINY).items()
        if not (name.startswith("visual.") and "norm" in name and name.endswith(".bias"))
    }
    save_file(weights, tmp_path / "r.safetensors")
    with pytest.raises(StepError, match="RMSNorm"):
        laid_out(TINY, "bf16", tmp_path / "out", tmp_path / "r.safetensors")


def test_a_vision_tower_of_other_heads_is_refused(qwen2vl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="40 features"):
        laid_out(qwen2vl_folder, "bf16", tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "bits", "quantize", "said"),
    [("awq", 4, "w4bf16", "as w4f16"), ("gptq", 8, "w4f16", "as w8f16")],
)
def test_a_quantized_checkpoint_fixes_the_mode(
    method: str, bits: int, quantize: str, said: str, qwen2_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((qwen2_folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": method, "bits": bits}, "dtype": "float16"}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"x.qweight": torch.zeros(2, 2, dtype=torch.int32)}, model / "model.safetensors")
    with pytest.raises(StepError, match=said):
        laid_out(model, quantize, tmp_path / "out")
    made, written = laid_out(model, "auto", tmp_path / "other")
    assert made.quantization == method
    assert written["torch_dtype"] == "float16"


def test_nets_that_were_not_used_for_longest_are_dropped_first(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(("new", "older", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.bmodel").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    drop_old_nets(tmp_path, most=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "older"]


def test_a_head_that_is_missing_is_an_error(qwen2_folder: Path, tmp_path: Path) -> None:
    weights = tensors_of(qwen2_folder)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "r.safetensors")
    with pytest.raises(StepError, match=r"lm_head\.weight"):
        laid_out(qwen2_folder, "bf16", tmp_path / "out", tmp_path / "r.safetensors")


def test_groups_of_weights_must_fill_the_rows(step: Any, tmp_path: Path) -> None:
    prepared, _ = laid_out(TINY, "w4bf16", tmp_path / "out")
    width = json.loads((TINY / "config.json").read_text())["hidden_size"]
    for mode, group in (("w4bf16", 32), ("w4bf16", 0), ("bf16", width + 1)):
        given = {"seq_length": 64, "quantize": mode, "q_group_size": group}
        check_groups(step("bmodel", "a.bmodel", {"model": TINY}, given).context, prepared)
    given = {"seq_length": 64, "quantize": "w4bf16", "q_group_size": width + 1}
    with pytest.raises(StepError, match=f"does not divide the model's hidden_size, {width}"):
        check_groups(step("bmodel", "a.bmodel", {"model": TINY}, given).context, prepared)


def test_only_whole_kernels_are_lent_to_the_next_build(step: Any, tmp_path: Path) -> None:
    """The compiler believes what its index names; a killed run leaves a folder that it does not."""
    toolchain = {"cache": str(tmp_path / "cache"), "version": "1.30.2"}
    given = {"seq_length": 64}
    context = step("bmodel", "a.bmodel", {"model": TINY}, given, toolchain=toolchain).context
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("111", "222", "333"):
        (first / name / "build").mkdir(parents=True)
        (first / name / "build" / "kernel.so").write_text(name)
    (first / "flag.txt").write_text("111 0\n222 1\n")  # 222 failed, 333 was under way
    take_kernels(context, first)
    second.mkdir()
    lend_kernels(context, second)
    assert (second / "flag.txt").read_text() == "111 0\n"
    assert sorted(path.name for path in second.iterdir()) == ["111", "flag.txt"]
    assert (second / "111" / "build" / "kernel.so").read_text() == "111"
    # What was lent is not taken for something new.
    take_kernels(context, second)
    stored = tmp_path / "cache" / "kernels" / "1.30.2"
    assert sorted(path.name for path in stored.iterdir()) == ["111"]


def test_without_a_store_nothing_is_lent_or_kept(step: Any, tmp_path: Path) -> None:
    toolchain = {"cache": "", "version": "1.30.2"}
    given = {"seq_length": 64}
    context = step("bmodel", "a.bmodel", {"model": TINY}, given, toolchain=toolchain).context
    (tmp_path / "flag.txt").write_text("111 0\n")
    take_kernels(context, tmp_path)
    lend_kernels(context, tmp_path)
    assert net_store(context) is None
    assert [path.name for path in tmp_path.glob("*.txt")] == ["flag.txt"]
