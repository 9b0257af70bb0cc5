"""Rules mblt and mxq against a strict stand-in of each generation of the compiler.

The stand-in knows exactly the names and types that the vendor documents; what the rules call
beyond them, it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.errors import StepError
from buildsys.formats.rotation_file import load_rotation
from buildsys.rules.mobilint.in_compiler import mblt_call
from buildsys.rules.spec import Input
from tests.mobilint.conftest import digest_of
from tests.mobilint.install import VERSIONS
from tests.mobilint.standin.recording import MBLT_MAGIC, MXQ_MAGIC, Refused, read, sha256

GENERATIONS = list(VERSIONS)
FUNCTIONS = ["0.11", "0.12", "1.0"]
TEXT = {
    "QK": {"apply": True},
    "UD": {"apply": True, "learn": True},
    "SpinR1": {"apply": True},
    "SpinR2": {"apply": True},
}


class Room:
    """Runs the rules over one model, one image folder and one compiler."""

    def __init__(self, make: Any, model: Path, images: Path, toolchain: dict[str, str]) -> None:
        self.make, self.model, self.images, self.toolchain = make, model, images, toolchain

    def mblt(self, part: str, *outputs: str, **options: Any) -> Any:
        inputs = {
            "model": self.model,
            "sample": Input("images", "images", {"path": self.images}, "i"),
        }
        options = {"part": part, "size": [56, 56], **options}
        return self.run("mblt", f"{part}.mblt", inputs, options, outputs)

    def calibration(self, part: str) -> Any:
        inputs = {
            "model": self.model,
            "images": Input("images", "images", {"path": self.images}, "i"),
        }
        options = {"part": part, "size": [56, 56]}
        return self.make("calibration-set", part, inputs, options)

    def mxq(self, part: str, mblt: Path, calibration: Path, *outputs: str, **given: Any) -> Any:
        inputs = {"mblt": self.artifact(mblt), "calibration": calibration}
        if "rotation" in given:
            inputs["rotation"] = self.artifact(given.pop("rotation"))
        options = {"part": part, "device": "gpu", **given}
        return self.run("mxq", f"{part}.mxq", inputs, options, outputs)

    def artifact(self, path: Path) -> Input:
        return Input(path.name, "artifact", {"path": path}, digest_of(path))

    def run(self, rule: str, name: str, inputs: Any, options: Any, outputs: tuple[str, ...]) -> Any:
        further = {each: f"{name}.{each}" for each in outputs}
        return self.make(rule, name, inputs, options, toolchain=self.toolchain, outputs=further)


@pytest.fixture
def room(make: Any, qwen2vl_folder: Path, images: Path, compiler: Any, in_process: None) -> Any:
    return lambda generation: Room(make, qwen2vl_folder, images, compiler(generation))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_generation_is_called_as_its_documentation_says(generation: str, room: Any) -> None:
    """mblt, calibration and mxq of both halves, in the order that the rotation asks for."""
    here = room(generation)
    text = here.mxq(
        "language", here.mblt("language").out, here.calibration("language").out, "rotation"
    )
    rotation = text.output("rotation")
    assert load_rotation(rotation).format == "torchscript"
    assert load_rotation(rotation).R.shape == (64, 64)
    assert text.notes["rotation"]["digest"] == digest_of(rotation)
    vision = here.mxq(
        "vision", here.mblt("vision").out, here.calibration("vision").out, rotation=rotation
    )
    said, seen = read(text.out, MXQ_MAGIC), read(vision.out, MXQ_MAGIC)
    assert said["rotation"] == seen["rotation"] == sha256(rotation)
    assert said["call"]["transforms"] == TEXT
    assert seen["call"]["transforms"] == {
        "HeadOutChRotation": {"apply": True, "matrixPath": "./head_rotation.pth"}
    }
    schemes = (said["call"]["inference_scheme"], seen["call"]["inference_scheme"])
    assert schemes == (("single", "multi") if generation in FUNCTIONS else ("all", "all"))
    assert said["call"]["device"] == ("cuda" if generation in FUNCTIONS else "gpu")
    assert [len(each["samples"]) for each in (said, seen)] == [2, 2]
    assert seen["samples"][0]["shape"] == [56, 56, 6]
    assert bits_of(said) == ["inputs_embeds/reshape"]
    assert bits_of(seen) == ["model_merger_fc2"]


def bits_of(content: dict[str, Any]) -> Any:
    call = content["call"]
    if "quantization" in call:
        return call["quantization"]["activation_16bits"]
    return call["config"]["bit"]["layerOverrides"]["activation16Bits"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_nothing_is_left_where_the_compiler_writes_rotations(generation: str, room: Any) -> None:
    here = room(generation)
    mblt = here.mblt("language").out
    stem = f"{mblt.stem}-{digest_of(mblt)[:16]}"
    root = Path("/tmp", "qubee" if generation.startswith("0") else "qbcompiler", "spinWeight")
    stale = root / stem / "R1"
    if generation in FUNCTIONS:
        stale.mkdir(parents=True)
        (stale / "global_rotation.pth").write_bytes(b"of a run that was killed")
    made = here.mxq("language", mblt, here.calibration("language").out, "rotation")
    assert load_rotation(made.output("rotation")).R.shape == (64, 64)
    assert not (root / stem).exists()


def test_the_first_generations_extras_are_given_and_later_ones_are_not(room: Any) -> None:
    found = {}
    for generation in FUNCTIONS:
        here = room(generation)
        made = here.mxq(
            "language", here.mblt("language").out, here.calibration("language").out, "rotation"
        )
        found[generation] = read(made.out, MXQ_MAGIC)["call"]
    assert found["0.11"]["quantization"]["mode"] == 1
    assert "mode" not in found["0.12"]["quantization"]
    assert [found[each]["llm_config"] for each in FUNCTIONS] == [True, False, False]
    assert [found[each]["singlecore_compile"] for each in FUNCTIONS] == [True, True, None]


def test_options_reach_the_compiler_in_every_spelling(room: Any) -> None:
    options = {
        "transforms": ["QK", "UD"],
        "ud_learn": False,
        "activation_16bits": ["a", "b"],
        "inference_scheme": "single",
        "calibration_mode": 2,
        "calibration_output": 1,
    }
    for generation in GENERATIONS:
        here = room(generation)
        made = here.mxq(
            "language", here.mblt("language").out, here.calibration("language").out, **options
        )
        call = read(made.out, MXQ_MAGIC)["call"]
        transforms = {"QK": {"apply": True}, "UD": {"apply": True, "learn": False}}
        assert call["transforms"] == transforms
        assert call["inference_scheme"] == "single"
        assert bits_of({"call": call}) == ["a", "b"]
        calibration = call.get("quantization") or call["config"]["calibration"]
        assert (calibration["mode"], calibration["output"]) == (2, 1)


def test_the_command_line_is_given_the_same_config(room: Any) -> None:
    here = room("1.3")
    mblt, calibration = here.mblt("language").out, here.calibration("language").out
    python = here.mxq("language", mblt, calibration, "rotation")
    typed = here.mxq("language", mblt, calibration, "rotation", interface="command-line")
    one, other = (read(each.out, MXQ_MAGIC) for each in (python, typed))
    assert other["call"]["config"].pop("inferenceScheme") == "all"
    assert {**one["call"], "version": ""} == {**other["call"], "version": ""}
    assert python.output("rotation").read_bytes() == typed.output("rotation").read_bytes()
    assert (2, 2, "steps") in typed.progress


def test_the_compiler_runs_in_a_process_of_its_own(
    make: Any, qwen2vl_folder: Path, images: Path, compiler: Any
) -> None:
    here = Room(make, qwen2vl_folder, images, compiler("1.1"))
    made = here.mblt("vision")
    assert read(made.out, MBLT_MAGIC)["part"] == "vision"


def test_a_model_whose_weights_are_lost_on_loading_is_refused(qwen2vl_folder: Path) -> None:
    """transformers 5 initialises a subclass at random, without an error."""
    from transformers import Qwen2VLForConditionalGeneration

    class Renamed(Qwen2VLForConditionalGeneration):
        pass

    with pytest.raises(SystemExit, match=r"did not load 2\d weights into Renamed"):
        mblt_call.loaded(Renamed, str(qwen2vl_folder))
    whole = mblt_call.loaded(Qwen2VLForConditionalGeneration, str(qwen2vl_folder))
    assert whole.num_parameters() > 0


def test_fields_that_the_recipe_adds_win(room: Any) -> None:
    for generation in ("1.1", "1.2", "1.3"):
        here = room(generation)
        more = {"llm": {"apply": True}, "bit": {"layerOverrides": {"activation16Bits": ["x"]}}}
        made = here.mxq(
            "language",
            here.mblt("language").out,
            here.calibration("language").out,
            "rotation",
            compile_config=more,
        )
        config = read(made.out, MXQ_MAGIC)["call"]["config"]
        assert config["llm"] == {"apply": True}
        assert config["bit"] == more["bit"]
        assert config["equivalentTransformation"] == TEXT


@pytest.mark.parametrize(
    ("generation", "options", "message"),
    [
        ("1.0", {"single_core": True}, "removed in 1.0"),
        ("1.1", {"target_device": "regulus-ra"}, "compiles for ARIES alone"),
        ("0.12", {"compile_config": {"llm": {}}}, "has no CompileConfig"),
        ("1.2", {"interface": "command-line"}, "no command line that works"),
        ("0.11", {"device": "cpu"}, "documented for GPUs alone"),
        ("0.12", {"calibration_method": 1}, "has no calibration method"),
    ],
)
def test_an_option_that_a_version_lacks_is_an_error_and_not_left_out(
    generation: str, options: dict[str, Any], message: str, room: Any
) -> None:
    here = room(generation)
    mblt, calibration = here.mblt("language").out, here.calibration("language").out
    with pytest.raises(StepError, match=message):
        here.mxq("language", mblt, calibration, "rotation", **options)


def test_what_the_compiler_says_of_a_failure_is_in_the_message(room: Any) -> None:
    here = room("1.1")
    mblt, calibration = here.mblt("language").out, here.calibration("language").out
    with pytest.raises(StepError, match="failed") as caught:
        here.mxq("language", mblt, calibration, "rotation", compile_config={"typo": {}})
    assert "CompileConfig has no field 'typo'" in str(caught.value)
    assert "qbcompiler 1.1.2" in str(caught.value)
    there = room("1.3")
    options = {"compile_config": {"typo": {}}, "interface": "command-line"}
    with pytest.raises(StepError, match=r"ERROR \[E_CONFIG\]"):
        there.mxq("language", there.mblt("language").out, calibration, "rotation", **options)


def test_a_rotation_that_is_none_is_refused_by_name(room: Any, tmp_path: Path) -> None:
    from buildsys.formats.errors import FormatError

    here = room("1.1")
    torch.save({"x": torch.eye(3)}, tmp_path / "no_rotation.pth")
    with pytest.raises(FormatError, match=r"no_rotation\.pth"):
        here.mxq(
            "vision",
            here.mblt("vision").out,
            here.calibration("vision").out,
            rotation=tmp_path / "no_rotation.pth",
        )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lengths_are_dynamic_and_the_last_query_is_not(generation: str, room: Any) -> None:
    here = room(generation)
    text = read(here.mblt("language", method="parser").out, MBLT_MAGIC)
    feed = text["feed"]
    assert feed["inputs_embeds"]["dynamic"] == [False, True, False]
    assert feed["position_ids"]["dynamic"] == [False, False, True]
    assert feed["attention_mask"]["dynamic"] == [False, True]
    assert text["target_device"] == ("aries-rb" if generation in ("1.2", "1.3") else "aries2")
    if generation in FUNCTIONS:
        first, last = "fx_patched_fn0/slice/matmul", "fx_patched_fn0_0/slice/matmul"
        for name in ("", "/mul", "/mask", "/mul/softmax"):
            assert text["dynamic"][first + name] == [False, False, True, True]
        for name in ("", "/mul", "/mul/softmax"):
            assert text["dynamic"][last + name] == [False, False, False, True]
        assert text["dynamic"][first + "/mul/softmax/matmul_0"] == [False, False, True, False]
        assert text["dynamic"][last + "/mul/softmax/matmul_0"] == [False] * 4


def test_the_vision_encoder_is_traced_over_the_calibrations_image(room: Any) -> None:
    import numpy as np

    from buildsys.formats.npy_set import read_list

    here = room("1.1")
    vision = read(here.mblt("vision").out, MBLT_MAGIC)
    array = np.load(read_list(here.calibration("vision").out)[0])
    assert vision["feed"]["images"]["shape"] == [1, 6, 56, 56]
    assert vision["feed"]["images"]["sum"] == pytest.approx(float(array.astype(np.float64).sum()))
    assert vision["formats"] == ["NHWC"]


def test_values_and_comparison_are_outputs_where_the_parser_makes_them(room: Any) -> None:
    here = room("1.1")
    made = here.mblt("vision", "infer", "comparison")
    assert made.output("infer").stat().st_size > 0
    assert made.output("comparison").read_text() == '{"stand-in": true}\n'
    later = room("1.2")
    with pytest.raises(StepError, match="writes no comparison"):
        later.mblt("vision", "infer", "comparison")
    assert later.mblt("vision", "infer", "comparison", method="parser").notes["method"] == "parser"
    with pytest.raises(StepError, match="has no mblt_compile"):
        here.mblt("vision", method="mblt_compile")


def test_the_stand_ins_outputs_can_be_taken_for_nothing_else(room: Any) -> None:
    from buildsys.formats.description import describe
    from buildsys.formats.errors import FormatError

    here = room("1.1")
    made = here.mxq(
        "language", here.mblt("language").out, here.calibration("language").out, "rotation"
    )
    assert not made.out.read_bytes().startswith(b".MXQ")
    with pytest.raises(FormatError):
        describe(made.out)


def test_the_stand_in_refuses_what_is_not_documented(room: Any) -> None:
    from tests.mobilint.standin.recording import need_one_of, need_type

    with pytest.raises(Refused):
        need_one_of("device", "cuda:0", "cuda")
    with pytest.raises(Refused):
        need_type("max_call_limit", True, int)
    room("1.1")
    from standin.by_configs import CompileConfig, mxq_compile_1_1

    with pytest.raises(TypeError):
        CompileConfig.model_validate({"bit": {"layer_overrides": {}}})
    with pytest.raises(TypeError):
        mxq_compile_1_1("a", save_path="b", calib_data_path="c", quantization_config=None)
