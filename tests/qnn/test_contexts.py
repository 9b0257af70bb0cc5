"""Contexts that Qualcomm's compiler made: what they say of themselves, and what they compute.

A random Qwen2-VL of two layers and two blocks; every figure is of Qualcomm's emulator of HTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from buildsys.cli.main import main
from buildsys.errors import StepError
from buildsys.formats.errors import FormatError
from buildsys.formats.qnn_binary import LIBRARY, read_qnn_binary, read_target
from buildsys.models.errors import ModelError
from buildsys.rules.qnn.targets import TARGETS
from buildsys.rules.spec import Input
from buildsys.toolchains.finding import Found
from tests.rules.conftest import Made

SMALL: Mapping[str, Any] = {"chunk": 16, "past": 16, "patches": 32, "layers_per_graph": 1}


@pytest.fixture
def inputs(qwen2vl_folder: Path, tmp_path: Path, make: Any) -> dict[str, Any]:
    """The model, its rotation, samples, and scales with the graphs' ranges."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 8)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        image = Image.effect_mandelbrot((84, 56), (-2, -1.5, 1 + index / 4, 1.5), 100)
        image.convert("RGB").save(folder / f"{index}.png")
    samples = [
        Input("text", "text", {"path": tmp_path / "text.txt"}, "t", {"tokens": 28, "samples": 8}),
        Input("images", "images", {"path": folder}, "i", {}),
    ]
    given = {
        "model": qwen2vl_folder,
        "rotation": make(
            "rotation", "rotation.bin", {"model": qwen2vl_folder}, {"method": "kronecker"}
        ).out,
    }
    scales = make(
        "activation-scales", "scales.json", {**given, "samples": samples}, {"points": "graph"}
    )
    return {**given, "scales": scales.out, "samples": samples}


def contexts(make: Any, inputs: Any, compiler: Found, **options: Any) -> Made:
    made: Made = make(
        "qnn-context", "soc", inputs, {**SMALL, **options}, toolchain=dict(compiler.fields)
    )
    return made


def metrics(made: Made) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(made.output("metrics").read_text())["variants"]
    return found


def test_contexts_compute_what_the_simulation_computes_and_say_what_was_planned(
    make: Any, inputs: dict[str, Any], compiler: Found, capsys: pytest.CaptureFixture[str]
) -> None:
    made = contexts(make, inputs, compiler)
    contract = json.loads((made.out / "io.json").read_text())
    assert contract["target"] == {"soc": "SM8650", "soc_model": 57, "arch": 75}
    graphs = [*contract["vision"]["graphs"], *contract["language"]["graphs"]]
    assert [graph["name"] for graph in graphs] == ["vision_0", "language_0", "language_1"]
    files = {name for graph in graphs for name in (graph["model"], graph["binary"])}
    assert {file.name for file in made.out.iterdir()} == {*files, "io.json", "tokenizer.json"}
    for graph in graphs:
        binary = read_qnn_binary(made.out / graph["binary"], library(compiler))
        assert (binary.soc, binary.arch, binary.soc_model) == ("SM8650", 75, 57)
        (found,) = binary.graphs
        for side, tensors in (("inputs", found.inputs), ("outputs", found.outputs)):
            told = {each["name"]: each for each in graph[side]}
            assert told.keys() == {tensor.name for tensor in tensors}
            for tensor in tensors:
                wanted = told[tensor.name]
                assert list(tensor.shape) == wanted["shape"]
                assert tensor.zero_point == wanted["zero_point"]
                assert tensor.scale == pytest.approx(wanted["scale"], rel=1e-6)
    for name, figures in metrics(made).items():
        assert figures["simulation_sqnr"] >= 35, name
        assert figures["simulation_cosine"] > 0.9999, name
        assert figures["fp32_sqnr"] >= 20, name
        assert figures["simulation_noise_db"] == -figures["simulation_sqnr"]
    # The text has 28 tokens: a chunk of 16, and one of 12 that attends to it.
    assert main(["inspect", str(made.out / "language_1_ctx_qnn.bin")]) == 0
    told = capsys.readouterr().out
    for word in ("SM8650", "v75", "model.layers.1.self_attn.key.past", "ufxp16", "2x16x16"):
        assert word in told


def test_two_builds_give_the_same_bytes(make: Any, inputs: dict[str, Any], compiler: Found) -> None:
    one, other = (contexts(make, inputs, compiler, vision=False).out for _ in range(2))
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.soc)
def test_every_target_is_what_the_binary_says(
    make: Any, inputs: dict[str, Any], compiler: Found, target: Any
) -> None:
    options = {"arch": target.arch, "layers_per_graph": 2, "vision": False, "past": 0}
    made = contexts(make, {**inputs, "samples": inputs["samples"][:1]}, compiler, **options)
    binary = made.out / "language_0_ctx_qnn.bin"
    assert read_target(binary) == (target.soc, target.arch)
    assert metrics(made)["language_0"]["simulation_sqnr"] >= 35


def test_8_bit_activations_are_worse_and_say_so(
    make: Any, inputs: dict[str, Any], compiler: Found
) -> None:
    options = {"precision": "A8W8", "vision": False, "past": 0, "chunk": 28}
    with pytest.raises(StepError, match=r"language_\d is .* dB from our simulation"):
        contexts(make, inputs, compiler, **options, least_sqnr=60)
    made = contexts(make, inputs, compiler, **options, least_sqnr=5)
    assert metrics(made)["language_0"]["fp32_sqnr"] < 35


def test_scales_without_ranges_are_refused_with_the_tensor_and_the_remedy(
    make: Any, inputs: dict[str, Any], compiler: Found
) -> None:
    content = json.loads(inputs["scales"].read_text())
    del content["ranges"]
    inputs["scales"].write_text(json.dumps(content))
    with pytest.raises(ModelError, match="points: graph"):
        contexts(make, inputs, compiler)


def test_ranges_that_do_not_fit_show_against_float(
    make: Any, inputs: dict[str, Any], compiler: Found
) -> None:
    """The simulation saturates just as the compiled graph does, and agrees with it."""
    content = json.loads(inputs["scales"].read_text())
    content["ranges"] = {name: [0.01 * a, 0.01 * b] for name, (a, b) in content["ranges"].items()}
    inputs["scales"].write_text(json.dumps(content))
    made = contexts(make, inputs, compiler, vision=False)
    assert metrics(made)["language_1"]["fp32_sqnr"] < 10


def test_an_image_that_does_not_fit_is_told_of(
    make: Any, inputs: dict[str, Any], compiler: Found
) -> None:
    with pytest.raises(ModelError, match="do not fit into a graph of 16"):
        contexts(make, inputs, compiler, patches=16)


def test_a_damaged_binary_is_an_error_and_no_crash(
    make: Any, inputs: dict[str, Any], compiler: Found, tmp_path: Path
) -> None:
    made = contexts(make, inputs, compiler, vision=False)
    whole = made.out / "language_0_ctx_qnn.bin"
    cut = tmp_path / "cut.bin"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(FormatError):
        read_qnn_binary(cut, library(compiler))
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="empty"):
        read_target(tmp_path / "empty.bin")


def library(compiler: Found) -> Path:
    return Path(compiler.fields["root"]) / LIBRARY
