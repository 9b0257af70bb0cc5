"""One layer at a time gives what the whole module gives, and goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.formats.rotation_file import save_rotation
from buildsys.models import profile_layers as module_under_test
from buildsys.models.layer_states import PROGRESS
from buildsys.models.layerwise import LayerwiseModel
from buildsys.models.open import open_model
from buildsys.models.profile import LinearStatistics, profile
from buildsys.models.profile_layers import profile_layers
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import load_rotations, make_rotations
from buildsys.models.runtime import load_module
from buildsys.models.samples import Length, Sample, TextSamples
from tests import tiny_models

TEXTS = ("one two three " * 8, "four " * 5, "the quick brown fox")


def texts() -> TextSamples:
    """Bytes as token ids."""
    return TextSamples(tuple(Sample(torch.tensor([list(text.encode())])) for text in TEXTS))


class Pictures(TextSamples):
    """Samples that know how many patches they have."""

    def lengths(self) -> list[Length]:
        found = []
        for sample in self.windows:
            assert sample.pixel_values is not None
            found.append(Length(sample.input_ids.shape[1], len(sample.pixel_values)))
        return found


def pictures() -> Pictures:
    """Two images of different size, with text around their tokens."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for height, width in ((4, 4), (6, 4)):
        pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator)
        image = [tiny_models.IMAGE_TOKEN] * (height * width // 4)
        ids = [1, tiny_models.FIRST_SPECIAL + 3, *image, tiny_models.FIRST_SPECIAL + 4, 7, 8]
        samples.append(Sample(torch.tensor([ids]), pixels, torch.tensor([[1, height, width]])))
    return Pictures(tuple(samples))


def assert_same(a: dict[str, LinearStatistics], b: dict[str, LinearStatistics]) -> None:
    """Equal to the last bit; only the head is summed in other blocks."""
    assert list(a) == list(b)
    for name in a:
        for side in ("input", "output"):
            one, other = getattr(a[name], side), getattr(b[name], side)
            if name == "lm_head":
                assert (one.ori, one.top_0_1, one.count) == (other.ori, other.top_0_1, other.count)
                assert one.mean == pytest.approx(other.mean, abs=1e-7)
                assert one.std == pytest.approx(other.std, rel=1e-6)
            else:
                assert one == other, name


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("first", ["text", "image"])
def test_statistics_are_those_of_the_whole_module(
    qwen2vl_folder: Path, tmp_path: Path, rotated: bool, first: str
) -> None:
    model = open_model(qwen2vl_folder)
    tensors = model.tensors
    if rotated:
        made = make_rotations(
            model.family, method="kronecker", seed=0, vision=True, construction="mllm"
        )
        save_rotation(tmp_path / "R.bin", made)
        tensors = rotated_tensors(model, load_rotations(tmp_path / "R.bin", model.family))
    samples = [texts(), pictures()] if first == "text" else [pictures(), texts()]
    whole = profile(model.family, load_module(model, tensors), samples)
    assert_same(profile_layers(model, tensors, samples, tmp_path), whole)


def test_a_text_model_gives_the_same(qwen2_folder: Path, tmp_path: Path) -> None:
    model = open_model(qwen2_folder)
    whole = profile(model.family, load_module(model), [texts()], mode="mllm")
    assert_same(profile_layers(model, model.tensors, [texts()], tmp_path, mode="mllm"), whole)


def test_a_head_in_parts_gives_the_same(
    qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "HEAD_PART", 64 * 4 * 50)
    model = open_model(qwen2_folder)
    whole = profile(model.family, load_module(model), [texts()])
    assert_same(profile_layers(model, model.tensors, [texts()], tmp_path), whole)


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize("at", ["visual.blocks.1", "model.embed_tokens", "model.layers.1"])
def test_a_killed_run_goes_on_behind_the_last_finished_layer(
    qwen2vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    model, samples = open_model(qwen2vl_folder), [texts(), pictures()]
    (tmp_path / "whole").mkdir()
    expected = profile_layers(model, model.tensors, samples, tmp_path / "whole")
    folder = tmp_path / "kept"
    folder.mkdir()
    with monkeypatch.context() as patch:
        kill_in(patch, at)
        with pytest.raises(Killed):
            profile_layers(model, model.tensors, samples, folder)
    finished = json.loads((folder / PROGRESS).read_text())["finished"]
    assert at not in finished
    filled = record_stages(monkeypatch)
    assert profile_layers(model, model.tensors, samples, folder) == expected
    assert not set(filled) & set(finished)
    assert len(list(folder.glob("*.states"))) == 1


def test_only_one_layer_has_weights_at_a_time(
    qwen2vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(qwen2vl_folder)
    seen: list[set[str]] = []
    run = LayerwiseModel.run

    def watched(self: Any, stage: Any, *rest: Any) -> Any:
        parts = {
            f"{kind}.{index}"
            for kind, layers in (("block", self._blocks), ("layer", self._layers))
            for index, layer in enumerate(layers)
            if any(p.device.type != "meta" for p in layer.parameters())
        }
        seen.append(parts)
        return run(self, stage, *rest)

    monkeypatch.setattr(LayerwiseModel, "run", watched)
    profile_layers(model, model.tensors, [pictures()], tmp_path)
    assert max(map(len, seen)) == 1


def test_progress_counts_layers_by_their_work(qwen2_folder: Path, tmp_path: Path) -> None:
    model, told = open_model(qwen2_folder), []
    profile_layers(
        model, model.tensors, [texts()], tmp_path, progress=lambda *how: told.append(how)
    )
    done = [each[0] for each in told]
    assert done == sorted(done)
    assert told[-1] == (4, 4, "layers")


def kill_in(patch: pytest.MonkeyPatch, name: str) -> None:
    """The stage of that name dies after its first sample."""
    run, embeddings = LayerwiseModel.run, LayerwiseModel.embeddings
    count = 0

    def dying_run(self: Any, stage: Any, *rest: Any) -> Any:
        nonlocal count
        count += stage.name == name
        if count > 1 and stage.name == name:
            raise Killed
        return run(self, stage, *rest)

    def dying_embeddings(self: Any, *given: Any) -> Any:
        for state in embeddings(self, *given):
            yield state
            if name == "model.embed_tokens":
                raise Killed

    patch.setattr(LayerwiseModel, "run", dying_run)
    patch.setattr(LayerwiseModel, "embeddings", dying_embeddings)


def record_stages(patch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    filled = LayerwiseModel.filled

    def recorded(self: Any, stage: Any) -> Any:
        names.append(stage.name)
        return filled(self, stage)

    patch.setattr(LayerwiseModel, "filled", recorded)
    return names
