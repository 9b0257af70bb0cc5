"""Calibration sets: the right arrays, resumable, and nothing left out in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from buildsys.errors import StepError
from buildsys.formats.npy_set import absolute_list, read_list
from buildsys.models.errors import ModelError
from buildsys.models.image_samples import image_samples
from buildsys.models.open import open_model
from buildsys.models.runtime import load_module, model_inputs
from buildsys.rules import calibration_set
from buildsys.rules.spec import Input

SIZES = [(112, 56), (60, 90), (84, 84)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


def arrays_of(folder: Path) -> list[np.ndarray]:
    return [np.load(file) for file in read_list(folder)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def given(qwen2vl_folder: Path, images: Path, **options: Any) -> dict[str, Any]:
    source = Input("images", "images", {"path": images}, "digest", options)
    return {"model": qwen2vl_folder, "images": source}


def test_language_arrays_are_what_the_real_model_gets(
    make: Any, qwen2vl_folder: Path, images: Path
) -> None:
    made = make("calibration-set", "language", given(qwen2vl_folder, images), {"part": "language"})
    prompts = [
        each["prompt"] for each in json.loads((made.out / "metadata.json").read_text())["samples"]
    ]
    model = open_model(qwen2vl_folder)
    module = load_module(model)
    captured: list[np.ndarray] = []
    module.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(kwargs["inputs_embeds"].numpy()), with_kwargs=True
    )
    samples = image_samples(model, images)
    for question, prompt in zip(samples.questions, prompts, strict=True):
        sample = samples.sample(dataclasses.replace(question, prompt=prompt))
        with torch.inference_mode():
            module(**model_inputs(module, sample))
    for found, expected in zip(arrays_of(made.out), captured, strict=True):
        assert found.dtype == np.float32
        assert found.shape[0] == 1
        assert np.array_equal(found, expected)


def test_vision_arrays_are_the_permuted_patches_bit_for_bit(
    make: Any, qwen2vl_folder: Path, images: Path
) -> None:
    inputs = given(qwen2vl_folder, images, size=[56, 84])
    made = make("calibration-set", "vision", inputs, {"part": "vision"})
    samples = image_samples(open_model(qwen2vl_folder), images, size=[56, 84])
    for found, sample in zip(arrays_of(made.out), samples, strict=True):
        assert sample.pixel_values is not None
        split = sample.pixel_values.numpy().reshape(2, 3, 2, 2, 3, 2, 14, 14)
        expected = split.transpose(0, 1, 6, 2, 3, 7, 5, 4).reshape(2 * 3 * 14, 56, 6)
        assert np.array_equal(found, expected)
    assert not made.warnings


def test_prompts_are_asked_in_turn_and_every_sample_says_which(
    make: Any, qwen2vl_folder: Path, images: Path
) -> None:
    inputs = given(qwen2vl_folder, images)
    made = make("calibration-set", "vision", inputs, {"part": "vision"})
    metadata = json.loads((made.out / "metadata.json").read_text())
    assert [each["name"] for each in metadata["samples"]] == [
        "short_answer_000",
        "detailed_description_001",
        "object_identification_002",
    ]
    assert metadata["num_samples"] == 3
    assert [each["shapes"]["images"] for each in metadata["samples"]] == [
        list(array.shape) for array in arrays_of(made.out)
    ]
    assert "size: [height, width]" in made.warnings[0]  # three sizes for a static encoder


def test_the_list_survives_a_moved_folder(
    make: Any, qwen2vl_folder: Path, images: Path, tmp_path: Path
) -> None:
    inputs = given(qwen2vl_folder, images)
    made = make("calibration-set", "vision", inputs, {"part": "vision"})
    listing = (made.out / "npy_files.txt").read_text()
    assert listing.splitlines()[0] == "sample_000/images.npy"
    moved = made.out.rename(tmp_path / "elsewhere")
    absolute_list(moved, tmp_path / "list.txt")
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert [np.load(line).shape for line in lines] == [a.shape for a in arrays_of(moved)]


def test_a_killed_step_goes_on_after_its_last_sample(
    step: Any, qwen2vl_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = step("calibration-set", "a", given(qwen2vl_folder, images), {"part": "language"})
    calibration_set.make(whole.context)
    kept = tmp_path / "kept"
    kept.mkdir()
    asked: list[str] = []
    real = calibration_set._capture

    def killed_after(count: int) -> Any:
        def capture(context: Any, model: Any, samples: Any) -> Any:
            inner = real(context, model, samples)

            def one(question: Any) -> Any:
                if len(asked) == count:
                    raise KeyboardInterrupt
                asked.append(question.image.name)
                return inner(question)

            return one

        return capture

    for stop in (2, 9):
        monkeypatch.setattr(calibration_set, "_capture", killed_after(stop))
        again = step("calibration-set", "b", given(qwen2vl_folder, images), {"part": "language"})
        context = dataclasses.replace(again.context, kept=kept)
        (kept / ".sample_002").mkdir(exist_ok=True)  # a write that was cut off
        if stop == 2:
            with pytest.raises(KeyboardInterrupt):
                calibration_set.make(context)
        else:
            calibration_set.make(context)
    assert asked == ["0.png", "1.png", "2.png"]  # none was made twice
    assert bytes_of(again.out) == bytes_of(whole.out)


def test_an_unreadable_image_fails_the_step_unless_the_recipe_allows_it(
    make: Any, qwen2vl_folder: Path, images: Path
) -> None:
    (images / "1.png").write_bytes(b"no picture")
    inputs = given(qwen2vl_folder, images)
    with pytest.raises(ModelError, match="no image that can be read"):
        make("calibration-set", "vision", inputs, {"part": "vision"})
    made = make("calibration-set", "vision", inputs, {"part": "vision", "allow_failures": 1})
    metadata = json.loads((made.out / "metadata.json").read_text())
    assert [each["directory"] for each in metadata["samples"]] == ["sample_000", "sample_002"]
    assert metadata["num_samples"] == 2
    assert list(made.notes["failed"]) == ["1.png"]
    assert "1.png is left out" in made.warnings[0]
    for name in ("0.png", "2.png"):
        (images / name).write_bytes(b"no picture")
    with pytest.raises(StepError, match="no image could be read"):
        make("calibration-set", "vision", inputs, {"part": "vision", "allow_failures": 3})


def test_bfloat16_rounds_and_stays_float32(make: Any, qwen2vl_folder: Path, images: Path) -> None:
    inputs = given(qwen2vl_folder, images)
    exact = make("calibration-set", "a", inputs, {"part": "vision"})
    options = {"part": "vision", "precision": "bfloat16"}
    rounded = make("calibration-set", "b", inputs, options)
    for found, full in zip(arrays_of(rounded.out), arrays_of(exact.out), strict=True):
        assert found.dtype == np.float32
        expected = torch.from_numpy(full).bfloat16().float().numpy()
        assert np.array_equal(found, expected)


def test_a_text_model_is_refused(make: Any, qwen2_folder: Path, images: Path) -> None:
    with pytest.raises(ModelError, match="sees no images"):
        make("calibration-set", "a", given(qwen2_folder, images), {"part": "language"})
