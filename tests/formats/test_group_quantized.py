"""Weights that AutoAWQ and AutoGPTQ packed are read as the numbers that they stand for.

The golden file holds one linear [32, 64] in groups of 16, packed by AutoAWQ 0.2.9 (gemm) and by
AutoGPTQ 0.7.1 with 2, 4 and 8 bits, in order and with shuffled groups ("act"), and what it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.config_file import ConfigFile
from buildsys.formats.errors import FormatError
from buildsys.formats.group_quantized import DequantizedTensors, Packing, read_packing

GOLDEN = Path(__file__).parents[1] / "golden" / "formats" / "group_quantized.safetensors"
NAMES = ("awq", "gptq2", "gptq2act", "gptq4", "gptq4act", "gptq8", "gptq8act")


def packing_of(name: str) -> Packing:
    if name == "awq":
        return Packing("awq", 4, 16)
    return Packing("gptq", int(name[4]), 16, stored_zero=1)


def opened(folder: Path, tensors: dict[str, torch.Tensor], packing: Packing) -> DequantizedTensors:
    save_file(tensors, folder / "model.safetensors")
    return DequantizedTensors(open_checkpoint(folder), packing)


def golden(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    stored = load_file(GOLDEN)
    parts = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
    return parts, parts.pop(f"{name}.expected")


@pytest.mark.parametrize("name", NAMES)
def test_packed_linear_is_the_weight_that_the_real_tool_packed(tmp_path: Path, name: str) -> None:
    parts, expected = golden(name)
    source = opened(tmp_path, {**parts, "norm.weight": torch.ones(3)}, packing_of(name))
    weight = f"{name}.weight"
    assert set(source.names()) == {weight, "norm.weight"}
    assert source.shape(weight) == (32, 64)
    assert source.dtype(weight) == torch.float32
    assert torch.equal(source.read(weight), expected)
    for start, stop in ((0, 5), (3, 17), (8, 16), (31, 40)):
        assert torch.equal(source.rows(weight, start, stop), expected[start:stop])
    source.release(weight)


def test_one_group_for_all_inputs(tmp_path: Path) -> None:
    parts, _ = golden("gptq4")
    del parts["gptq4.g_idx"]
    for part in ("qzeros", "scales"):
        parts[f"gptq4.{part}"] = parts[f"gptq4.{part}"][:1].clone()
    source = opened(tmp_path, parts, Packing("gptq", 4, -1, stored_zero=1))
    weight = source.read("gptq4.weight")
    scale = parts["gptq4.scales"][0].float()[:, None]
    steps = weight / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_version_2_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    parts, expected = golden("gptq4")
    source = opened(tmp_path, parts, Packing("gptq", 4, 16, stored_zero=0))
    scales = parts["gptq4.scales"].float()[torch.arange(64) // 16].T
    assert torch.allclose(source.read("gptq4.weight"), expected + scales, atol=1e-6)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    parts, _ = golden("awq")
    del parts["awq.scales"]
    source = opened(tmp_path, parts, packing_of("awq"))
    with pytest.raises(FormatError, match=r"awq\.scales.*is missing"):
        source.read("awq.weight")


def test_groups_that_do_not_fit_the_scales_are_refused(tmp_path: Path) -> None:
    parts, _ = golden("awq")
    source = opened(tmp_path, parts, Packing("awq", 4, 8))
    with pytest.raises(FormatError, match="more than the 4 groups"):
        source.read("awq.weight")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, Packing("awq", 4, 64)),
        ({"quant_method": "awq", "version": "GEMM"}, Packing("awq", 4, 128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Packing("gptq", 8, -1, 1)),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, Packing("gptq", 4, 128, 0)),
    ],
)
def test_config_says_how_integers_lie(told: dict[str, object], expected: Packing) -> None:
    assert read_packing(ConfigFile(Path("config.json"), {"quantization_config": told})) == expected


def test_config_of_a_float_checkpoint_says_nothing() -> None:
    assert read_packing(ConfigFile(Path("config.json"), {})) is None


@pytest.mark.parametrize(
    ("told", "field"),
    [
        ({"quant_method": "fp8"}, "quantization_config.quant_method"),
        ({"quant_method": "awq", "version": "gemv"}, "quantization_config.version"),
        ({"quant_method": "gptq", "bits": 3}, "quantization_config.bits"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "quantization_config.checkpoint_format",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_field(told: dict[str, object], field: str) -> None:
    with pytest.raises(FormatError, match=json.dumps(field)[1:-1].replace(".", r"\.")):
        read_packing(ConfigFile(Path("config.json"), {"quantization_config": told}))
