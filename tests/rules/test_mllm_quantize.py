"""The promises of rule `mllm-quantize`: mllm's bytes, its types per tensor, nothing in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from buildsys.errors import Location, StepError
from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.errors import FormatError
from buildsys.models.linear_inputs import inputs_by_layer
from buildsys.models.open import open_model
from buildsys.models.samples import open_samples
from buildsys.models.variant import open_variant
from buildsys.plan.graph import Plan, Ref, Step
from buildsys.quant import kleidiai
from buildsys.quant.errors import QuantError
from buildsys.quant.gptq import Hessian, layer_loss
from buildsys.quant.mllm_blocks import quantize
from buildsys.rules.mllm_quantize import check
from buildsys.rules.spec import Input
from tests import tiny_models
from tests.rules.plans import plan_of


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_model_and_rotation_stream_into_mllms_own_bytes(
    make: Callable[..., Any], golden: Path, kind: str
):
    folder = golden / "mllm_qwen2_tiny"
    inputs = {"model": folder, "rotation": folder / "R.bin"}
    made = make("mllm-quantize", "q.mllm", inputs, {"type": kind})
    assert made.out.read_bytes() == (folder / f"rot_{kind}.mllm").read_bytes()
    assert made.notes["types"] == {
        ("Q4_0"): 1 + 15 * (kind == "Q4_0"), "F32": 11, **({} if kind == "Q4_0" else {kind: 15})
    }  # fmt: skip
    assert made.warnings == []
    assert made.progress[-1] == (27, 27, "tensors")


def test_by_way_of_a_rotated_checkpoint_the_bytes_are_the_same(
    make: Callable[..., Any], golden: Path
):
    folder = golden / "mllm_qwen2_tiny"
    inputs = {"model": folder, "rotation": folder / "R.bin"}
    rotated = make("rotated-checkpoint", "r.safetensors", inputs).out
    expected = (folder / "rot_Q6_K.mllm").read_bytes()
    made = make("mllm-quantize", "q.mllm", {"checkpoint": rotated}, {"type": "Q6_K"})
    assert made.out.read_bytes() == expected
    f32 = make("mllm-file", "f32.mllm", {"checkpoint": rotated}).out
    with pytest.raises(QuantError, match="stores no shapes"):
        make("mllm-quantize", "q.mllm", {"checkpoint": f32}, {"type": "Q6_K"})
    both = {"checkpoint": f32, "model": folder}
    made = make("mllm-quantize", "q.mllm", both, {"type": "Q6_K"})
    assert made.out.read_bytes() == expected


WIDE, NARROW = 256, 160


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": normal(32, WIDE),
        "model.layers.0.mlp.up_proj.weight": normal(64, WIDE),
        "model.layers.0.self_attn.q_proj.weight": normal(WIDE, WIDE),
        "model.layers.0.self_attn.q_proj.bias": normal(WIDE),
        "model.layers.0.input_layernorm.weight": normal(WIDE),
        "visual.blocks.0.attn.qkv.weight": normal(48, NARROW),
        "visual.patch_embed.proj.weight": normal(NARROW, 3, 2, 4, 4),
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "c.safetensors"
    save_file(tensors(), path)
    return path


def stored_types(path: Path) -> dict[str, str]:
    source = open_checkpoint(path)
    return {name: source.stored_type(name) for name in source.names()}


def test_rows_that_do_not_divide_are_an_error_that_names_the_tensor(
    make: Callable[..., Any], checkpoint: Path
):
    with pytest.raises(QuantError, match=r"visual\.blocks\.0\.attn\.qkv\.weight: rows of 160"):
        make("mllm-quantize", "q.mllm", {"checkpoint": checkpoint}, {"type": "Q4_K"})


def test_every_fallback_is_told_noted_and_logged(
    make: Callable[..., Any], checkpoint: Path, caplog: pytest.LogCaptureFixture
):
    options = {"type": "Q4_K", "fallback": "Q8_0"}
    made = make("mllm-quantize", "q.mllm", {"checkpoint": checkpoint}, options)
    assert stored_types(made.out) == {
        "model.embed_tokens.weight": "Q4_0",
        "model.layers.0.input_layernorm.weight": "F32",
        "model.layers.0.mlp.up_proj.weight": "Q4_K",
        "model.layers.0.self_attn.q_proj.bias": "F32",
        "model.layers.0.self_attn.q_proj.weight": "Q4_K",
        "visual.blocks.0.attn.qkv.weight": "Q8_0",
        "visual.patch_embed.proj.weight": "F32",
        "lm_head.weight": "Q4_K",  # made from the embedding, and last, as mllm does
    }
    assert list(stored_types(made.out))[-1] == "lm_head.weight"
    assert made.notes["fallback"] == {"visual.blocks.0.attn.qkv.weight": "Q8_0"}
    assert len(made.warnings) == 1
    assert "visual.blocks.0.attn.qkv.weight" in made.warnings[0]
    assert "visual.blocks.0.attn.qkv.weight is Q8_0, not Q4_K" in caplog.text


def test_blocks_are_those_of_the_tensors_and_repeat(make: Callable[..., Any], checkpoint: Path):
    options = {"type": "Q6_K", "fallback": "Q8_0", "version": 2}
    made = make("mllm-quantize", "q.mllm", {"checkpoint": checkpoint}, options)
    read = open_checkpoint(made.out)
    for name, kind in stored_types(made.out).items():
        original = tensors()["model.embed_tokens.weight" if name == "lm_head.weight" else name]
        if kind == "F32":
            assert torch.equal(read.read(name), original), name
        else:
            expected = quantize(original.numpy(), kind)
            assert read.read(name).numpy().tobytes() == expected.tobytes(), name
    again = make("mllm-quantize", "q.mllm", {"checkpoint": checkpoint}, options)
    assert again.out.read_bytes() == made.out.read_bytes()


def test_what_is_quantized_already_is_refused(make: Callable[..., Any], tmp_path: Path):
    save_file({"a.weight": torch.ones(4, 32, dtype=torch.int8)}, tmp_path / "i.safetensors")
    with pytest.raises(StepError, match=r"'a\.weight' is I8, not float"):
        make("mllm-quantize", "q", {"checkpoint": tmp_path / "i.safetensors"}, {"type": "Q8_0"})


def test_a_nan_is_an_error_that_names_the_tensor(make: Callable[..., Any], tmp_path: Path):
    save_file({"a.weight": torch.full((4, 32), torch.nan)}, tmp_path / "n.safetensors")
    with pytest.raises(FormatError, match=r"a\.weight"):
        make("mllm-quantize", "q", {"checkpoint": tmp_path / "n.safetensors"}, {"type": "Q8_0"})


def configured(
    make: Callable[..., Any], checkpoint: Path, config: dict[str, Any], **options: Any
) -> Any:
    path = checkpoint.parent / "quant.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return make("mllm-quantize", "q.mllm", {"checkpoint": checkpoint, "config": path}, options)


def gguf(kind: str, **hints: Any) -> dict[str, Any]:
    return {"hints": {"quant_method": "gguf", "gguf_type": kind, **hints}}


def test_a_config_quantizes_what_its_patterns_match(make: Callable[..., Any], checkpoint: Path):
    config = {
        r"model\.layers\.\d+\.self_attn\.q_proj.(bias|weight)": gguf("Q4_K"),
        r"visual\.blocks\.\d+\.attn\.qkv\.weight": gguf("Q8_0"),
        r"model\.embed_tokens\.weight": gguf("Q4_0", replace=False, rename="model.lm_head.weight"),
    }
    made = configured(make, checkpoint, config, version=2)
    assert stored_types(made.out) == {
        "model.embed_tokens.weight": "F32",
        "model.layers.0.input_layernorm.weight": "F32",
        "model.layers.0.mlp.up_proj.weight": "F32",
        "model.layers.0.self_attn.q_proj.bias": "F32",  # never deleted
        "model.layers.0.self_attn.q_proj.weight": "Q4_K",
        "model.lm_head.weight": "Q4_0",
        "visual.blocks.0.attn.qkv.weight": "Q8_0",
        "visual.patch_embed.proj.weight": "F32",
    }
    bias = open_checkpoint(made.out).read("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(bias, tensors()["model.layers.0.self_attn.q_proj.bias"])


def test_the_form_before_v2_is_translated(make: Callable[..., Any], checkpoint: Path):
    old = {
        "ModelName": "Qwen2-VL",
        "Ops": {
            "model.layers.0.self_attn.q_proj": {"type": "Linear", "implType": "Q4_K"},
            "model.layers.0.mlp.up_proj": {"type": "Linear", "implType": "Default"},
        },
    }
    new = {r"model\.layers\.0\.self_attn\.q_proj\.weight": gguf("Q4_K")}
    one = configured(make, checkpoint, old).out.read_bytes()
    assert one == configured(make, checkpoint, new).out.read_bytes()


def test_shapes_may_come_from_the_config(make: Callable[..., Any], tmp_path: Path):
    weights = {"a.weight": torch.randn(6, 64), "b.bias": torch.randn(6)}
    save_file(weights, tmp_path / "c.safetensors")
    flat = make("mllm-file", "c.mllm", {"checkpoint": tmp_path / "c.safetensors"}).out
    moved = shutil.copy(flat, tmp_path / "flat.mllm")
    made = configured(make, Path(moved), {r"a\.weight": gguf("Q8_0", shape=[6, 64])})
    expected = quantize(weights["a.weight"].numpy(), "Q8_0").tobytes()
    assert open_checkpoint(made.out).read("a.weight").numpy().tobytes() == expected
    with pytest.raises(StepError, match=r"has 384 values; the config's shape \[7, 64\] has 448"):
        configured(make, Path(moved), {r"a\.weight": gguf("Q8_0", shape=[7, 64])})


def kai(**hints: Any) -> dict[str, Any]:
    return {"hints": {"quant_method": "kai", **hints}}


def test_weights_packed_for_kleidiai_are_blobs_of_version_2(
    make: Callable[..., Any], tmp_path: Path
):
    """Also in parts of a few panels, with the bias in the blob and beside it."""
    W = torch.randn(1500, 96, generator=torch.Generator().manual_seed(0))
    weights = {"a.weight": W, "a.bias": torch.randn(1500), "norm.weight": torch.ones(96)}
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    tile = "qai8dxp1x8_qsi4c32p8x8_1x8x32"
    config = {r"a\.weight": kai(kai_matmul_tile_cfg=tile)}
    with pytest.raises(StepError, match="Set version: 2"):
        configured(make, folder, config)
    made = configured(make, folder, config, version=2)
    found = open_checkpoint(made.out)
    expected = kleidiai.pack(W.numpy(), weights["a.bias"].numpy(), kleidiai.TILES[tile])
    assert found.stored_type("a.weight") == "BYTE"
    assert found.read("a.weight").numpy().tobytes() == expected.tobytes()
    assert torch.equal(found.read("a.bias"), weights["a.bias"])


Q_PROJ = r"model\.layers\.0\.self_attn\.q_proj\.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({r"model\.layers\.9\..*": gguf("Q4_K")}, "matches none of the 7 tensors"),
        ({"self_attn.q_proj": gguf("Q4_K")}, "must match a whole name"),
        ({Q_PROJ: gguf("Q4_K"), "model.*q_proj.*": gguf("Q8_0")}, "both replace it"),
        ({r".*\.bias": gguf("Q8_0")}, "biases only"),
        ({r".*(up|q)_proj\.weight": gguf("Q8_0", rename="x")}, "x: would be made twice"),
        ({Q_PROJ: gguf("Q4_K", replace=False)}, "rename"),
        ({Q_PROJ: kai(kai_matmul_layout="mxk_kxn")}, "mxk_nxk can be made"),
        ({Q_PROJ: kai(kai_matmul_tile_cfg="1x2")}, "Known: qai8dxp1x8"),
        ({Q_PROJ: {"hints": {"quant_method": "awq"}}}, "neither 'gguf' nor 'kai'"),
        ({Q_PROJ: gguf("Q8_K")}, "comes with a later version"),
        ({Q_PROJ: gguf("Q5_K")}, "is no type"),
        ({Q_PROJ: gguf("Q4_K", colour="red")}, "colour"),
        ({"(": gguf("Q4_K")}, "no regular expression"),
        ({}, "no object|not an object"),
        ({"ModelName": "x", "Ops": {}}, "quantizes nothing"),
        ({"Ops": {"model.norm": {"type": "RMSNorm", "implType": "Q4_K"}}}, "RMSNorm"),
        ({"Ops": {"a": {"type": "Linear", "implType": "KaiLinear_f32"}}}, "later version"),
    ],
)
def test_what_a_config_cannot_mean_is_an_error(
    make: Callable[..., Any], checkpoint: Path, config: dict[str, Any], message: str
):
    with pytest.raises((FormatError, QuantError), match=message):
        configured(make, checkpoint, config)


def problems(options: dict[str, Any], *inputs: str) -> list[str]:
    given = {name: (Ref("source", name),) for name in inputs}
    defaults = {"type": None, "fallback": None, "version": 1}
    step = Step(
        "q.mllm", "mllm-quantize", given, {**defaults, **options}, {"out": "q.mllm"}, False, False,
        (), 1, {}, None, None, {}, Location("r", 1, 1),
    )  # fmt: skip
    return [p.message for p in check(step, Plan("r", "r", {}, {}, {}, {}, (), {}))]


def test_check_finds_contradictions_before_anything_runs():
    assert problems({"type": "Q4_K"}, "checkpoint") == []
    assert problems({"type": "Q4_K"}, "model", "rotation") == []
    assert problems({}, "checkpoint", "config") == []
    assert problems({}, "checkpoint") == ["there is neither a type nor a config"]
    assert problems({"type": "Q4_K"}, "model", "config") == ["there is both a type and a config"]
    assert problems({"type": "KAI_Q4_0"}, "model") == ["type KAI_Q4_0 comes with a later version"]
    assert problems({"type": "Q4_K"}) == ["there is no `checkpoint` and no `model`"]
    wrong = problems({"type": "Q4_K"}, "checkpoint", "rotation")
    assert wrong == ["a checkpoint takes no rotation here"]


def test_golden_tensors_are_what_the_names_say(golden: Path):
    """The file that the byte tests compare with is mllm's, of this model."""
    names = set(load_file(golden / "mllm_qwen2_tiny" / "model.safetensors"))
    assert set(stored_types(golden / "mllm_qwen2_tiny" / "rot_Q4_K.mllm")) == names


@pytest.mark.parametrize(
    ("method", "kind"),
    [("gptq", "Q4_0"), ("gptq", "Q4_K"), ("imatrix", "Q4_0"), ("imatrix", "Q4_K")],
)
def test_calibrated_blocks_keep_the_format_and_bring_the_layers_nearer(
    make: Callable[..., Any], tmp_path: Path, method: str, kind: str
):
    new = tiny_models.new_qwen2(hidden_size=256, intermediate_size=256, head_dim=64)
    folder = tiny_models.save_model(new, tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    options = {"samples": 8, "tokens": 128}
    samples = Input("text", "text", {"path": tmp_path / "text.txt"}, "d", options)
    inputs = {"model": folder, "samples": [samples]}
    plain = make("mllm-quantize", "plain.mllm", inputs, {"type": kind})
    made = make("mllm-quantize", "q.mllm", inputs, {"type": kind, "calibration": method})
    assert made.notes["types"] == plain.notes["types"]
    assert made.notes["calibrated"] == 14
    assert made.out.stat().st_size == plain.out.stat().st_size
    opened = open_model(folder)
    windows = open_samples(opened, "text", {"path": tmp_path / "text.txt"}, options)
    (tmp_path / "states").mkdir()
    layers = inputs_by_layer(opened, opened.tensors, [windows], tmp_path / "states", Hessian)
    plain_tensors, made_tensors = (
        open_variant(file, opened.family).tensors for file in (plain.out, made.out)
    )
    first = next(iter(layers))  # what the first layer reads is the same in both
    for linear in ("self_attn.q_proj", "self_attn.v_proj"):
        name = f"model.layers.0.{linear}"
        H = first[name].H if method == "gptq" else first[name].H.diagonal().diag()
        W = opened.tensors.read(f"{name}.weight")
        losses = [
            layer_loss(W, tensors.read(f"{name}.weight"), H)
            for tensors in (plain_tensors, made_tensors)
        ]
        assert losses[1] < losses[0]


def test_calibration_without_samples_or_of_no_linear_is_refused(
    make: Callable[..., Any], qwen2_folder: Path, tmp_path: Path
):
    (tmp_path / "text.txt").write_text("abc " * 100)
    samples = Input("text", "text", {"path": tmp_path / "text.txt"}, "d", {"tokens": 32})
    inputs = {"model": qwen2_folder, "samples": [samples]}
    with pytest.raises(StepError, match="imatrix is for Q4_0, Q2_K"):
        make("mllm-quantize", "q.mllm", inputs, {"type": "Q8_0", "calibration": "imatrix"})
    step, plan = plan_of(
        "q.mllm", "mllm-quantize", options={"type": "Q4_0", "calibration": "gptq"}, model="m"
    )
    assert [problem.option for problem in check(step, plan)] == ["calibration"]
