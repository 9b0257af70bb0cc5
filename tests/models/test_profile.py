"""Statistics are those of the real tool, and of every value that passed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from buildsys.models.open import open_model
from buildsys.models.profile import LinearStatistics, profile
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import load_rotations
from buildsys.models.runtime import hidden_states, load_module
from buildsys.models.samples import Sample, TextSamples
from tests import tiny_models


def texts(*contents: str) -> TextSamples:
    """Bytes as token ids."""
    return TextSamples(tuple(Sample(torch.tensor([list(text.encode())])) for text in contents))


def test_scales_of_the_real_tool_are_reproduced(golden_folder: Path) -> None:
    model = open_model(golden_folder / "mllm_qwen2_tiny")
    rotations = load_rotations(model.folder / "R.bin", model.family)
    samples = texts("abc def " * 9, "the quick brown fox " * 4, "zebra" * 3)
    module = load_module(model, rotated_tensors(model, rotations))
    found = profile(model.family, module, [samples], mode="mllm")
    golden = json.loads((model.folder / "dis.json").read_text())
    assert list(found) == list(golden["ori"])
    for name, both in found.items():
        for side in ("input", "output"):
            statistics = getattr(both, side)
            for key in ("ori", "top_0_1"):
                assert getattr(statistics, key) == pytest.approx(golden[key][name][side], rel=2e-6)
            moments = golden["all_stat"][name][side]
            assert statistics.mean == pytest.approx(moments["mean"], abs=1e-7)
            assert statistics.std == pytest.approx(moments["std"], rel=1e-6)


def test_samples_of_equal_length_work_and_order_does_not_matter(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    module = load_module(model)
    a, b = (
        profile(model.family, module, [texts("x" * 30, "yz" * 15)]),
        profile(model.family, module, [texts("yz" * 15), texts("x" * 30)]),
    )
    _assert_equal(a, b)


def test_statistics_are_those_of_all_values_at_once(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    module = load_module(model)
    samples = texts("one two three " * 8, "four " * 5)
    seen: list[torch.Tensor] = []
    name = "model.layers.1.mlp.up_proj"
    handle = module.get_submodule(name).register_forward_hook(
        lambda m, x, y: seen.append(y.clone())
    )
    for sample in samples:
        hidden_states(module, sample)
    handle.remove()
    every = torch.cat([y.flatten() for y in seen])
    found = profile(model.family, module, [samples])[name].output
    assert found.count == len(every)
    assert found.ori == float(every.abs().max())
    assert found.top_0_1 == float(every.abs().sort().values[int(len(every) * 0.999) - 1])
    assert found.mean == pytest.approx(float(every.double().mean()), abs=1e-7)
    assert found.std == pytest.approx(float(every.double().std(correction=0)), rel=1e-6)


def test_outputs_are_taken_before_the_bias_unless_told(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    module = load_module(model)
    name = "model.layers.0.self_attn.q_proj"
    bias = module.get_submodule(name).bias
    bias.data.fill_(1000.0)
    samples = [texts("some text")]
    assert profile(model.family, module, samples)[name].output.ori < 100
    assert profile(model.family, module, samples, no_bias=False)[name].output.ori > 900


def test_a_tensor_that_several_linears_read_has_one_statistic(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    found = profile(model.family, load_module(model), [texts("some text")])
    for group in model.family.groups:
        assert len({id(found[name].input) for name in group}) == 1
        assert len({found[name].output for name in group}) == len(group)


def test_images_reach_the_vision_tower_and_text_does_not(qwen2vl_folder: Path) -> None:
    model = open_model(qwen2vl_folder)
    module = load_module(model)
    image = [tiny_models.IMAGE_TOKEN] * 4
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    sample = Sample(torch.tensor([[1, *image, 2]]), pixels, torch.tensor([[1, 4, 4]]))
    both = profile(model.family, module, [texts("text"), TextSamples((sample,))])
    observed = {linear.name for linear in model.family.linears.values() if linear.observed}
    assert set(both) == observed
    assert both["visual.blocks.0.attn.qkv"].input.count == 16 * 80
    assert both["visual.merger.mlp.0"].input.count == 4 * 320
    assert both["model.layers.0.self_attn.q_proj"].input.count == (4 + 6) * 64
    text = profile(model.family, module, [texts("text")])
    assert set(text) == {name for name in observed if not name.startswith("visual.")}


def test_progress_ends_at_the_number_of_tokens(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    told: list[tuple[float, float, str]] = []
    profile(
        model.family,
        load_module(model),
        [texts("ab", "cde")],
        progress=lambda done, total, unit: told.append((done, total, unit)),
    )
    assert told == [(2, 5, "tokens"), (5, 5, "tokens")]


def _assert_equal(a: dict[str, LinearStatistics], b: dict[str, LinearStatistics]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        for side in ("input", "output"):
            one, other = getattr(a[name], side), getattr(b[name], side)
            assert (one.ori, one.top_0_1, one.count) == (other.ori, other.top_0_1, other.count)
            assert one.std == pytest.approx(other.std, rel=1e-9)
