"""Forward passes run where and as they are told to, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from buildsys.models.computing import Compute, back, open_compute
from buildsys.models.errors import ModelError
from buildsys.models.layerwise import LayerwiseModel
from buildsys.models.open import open_model
from buildsys.models.profile_layers import profile_layers
from buildsys.models.samples import Samples
from tests.models.test_profile_layers import pictures, texts

META = Compute(torch.device("meta"), torch.bfloat16)


@pytest.fixture
def samples() -> list[Samples]:
    return [texts(), pictures()]


def test_every_tensor_of_every_stage_is_on_the_device(
    qwen2vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses to mix its meta device with the CPU: one tensor left behind would fail. Only
    the vision tower reads the values of its grid; what it is given is looked at instead."""
    model = open_model(qwen2vl_folder)
    layerwise = LayerwiseModel(model, model.tensors, META)
    sample = pictures().windows[0]
    assert sample.pixel_values is not None
    state, light = sample.pixel_values, layerwise.light(sample)
    seen = []

    def tower(state: torch.Tensor, grid_thw: torch.Tensor) -> SimpleNamespace:
        assert (state.device.type, grid_thw.device.type) == ("meta", "meta")
        return SimpleNamespace(pooler_output=state)

    monkeypatch.setattr(layerwise._visual, "forward", tower)
    for stage in layerwise.stages(images=True):
        if stage.kind == "embedding":
            state = torch.zeros(sample.input_ids.shape[1], model.config.hidden_size)
            continue
        with layerwise.filled(stage) as part:
            assert {weight.device.type for weight in part.parameters()} == {"meta"}
            state = layerwise.run_there(stage, light, torch.zeros(state.shape))
        assert (state.device.type, state.dtype) == ("meta", torch.bfloat16), stage.name
        seen.append(stage.kind)
    assert {"patches", "block", "merger", "layer", "head"} == set(seen)
    head = next(layerwise.head_parts(1 << 20))
    assert (head.device.type, head.dtype) == ("meta", torch.bfloat16)


def test_what_comes_back_is_float32_on_the_cpu() -> None:
    values = Compute(dtype=torch.bfloat16).there(torch.tensor([1.0, 1e-3]))
    assert values.dtype == torch.bfloat16
    assert torch.equal(back(values), torch.tensor([1.0, 1e-3]).bfloat16().float())
    assert Compute(dtype=torch.bfloat16).there(torch.tensor([3])).dtype == torch.int64


def test_ranges_in_bf16_move_by_a_rounding_or_two(
    qwen2vl_folder: Path, samples: list[Samples], tmp_path: Path
) -> None:
    model = open_model(qwen2vl_folder)
    found = {}
    for name in ("fp32", "bf16"):
        (tmp_path / name).mkdir()
        compute = open_compute("cpu", name)
        found[name] = profile_layers(
            model, model.tensors, samples, tmp_path / name, compute=compute
        )
    assert list(found["fp32"]) == list(found["bf16"])
    assert found["fp32"] != found["bf16"]
    for name, exact in found["fp32"].items():
        for side in ("input", "output"):
            one, other = getattr(exact, side), getattr(found["bf16"][name], side)
            assert one.count == other.count
            # bfloat16 has 8 bits: a step is 1/128 of a value; errors add up over the layers.
            assert other.ori == pytest.approx(one.ori, rel=4 / 128), (name, side)
            assert other.std == pytest.approx(one.std, rel=1 / 128), (name, side)


def test_cuda_where_there_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"(?s)device cuda is asked for.*Set device: cpu"):
        open_compute("cuda")
    with pytest.raises(ModelError, match="'auto' is unknown"):
        open_compute("auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_ranges_of_the_cpu(
    qwen2vl_folder: Path, samples: list[Samples], tmp_path: Path, precision: str
) -> None:
    model = open_model(qwen2vl_folder)
    found = {}
    try:
        for device in ("cpu", "cuda"):
            (tmp_path / device).mkdir()
            compute = open_compute(device, precision)
            found[device] = profile_layers(
                model, model.tensors, samples, tmp_path / device, compute=compute
            )
    finally:
        torch.set_deterministic_debug_mode("default")
    assert list(found["cpu"]) == list(found["cuda"])
    for name, here in found["cpu"].items():
        there = found["cuda"][name]
        within = 1e-4 if precision == "fp32" else 4 / 128
        assert there.output.ori == pytest.approx(here.output.ori, rel=within), name
        assert there.input.count == here.input.count
