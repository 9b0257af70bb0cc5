"""A learned rotation loses less, changes no float output, and is the same every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.formats.rotation_file import Rotation, check_rotation
from buildsys.models.errors import ModelError
from buildsys.models.int8_state import Int8Layout, LinearScales, write_int8
from buildsys.models.learned_rotation import Learned, Learning, learn_rotation
from buildsys.models.open import Model, open_model
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, make_rotations
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import Sample, TextSamples
from buildsys.models.simulate import StaticLinear, simulate
from buildsys.models.turned_language import TurnedLanguage, Turns, kl_and_gradient
from buildsys.models.variant import open_variant
from buildsys.quant.int8 import ActivationScale
from tests import tiny_models

HOW = Learning(steps=6, rate=0.03, batch=2, weights=True, target="mllm-v1-vl", seed=0)
# Of the largest logit; transformers' RMSNorm computes in float32 whatever the model's type.
FLOAT64_LIMIT = 2e-6

NEW_MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "qwen2": tiny_models.new_qwen2,
    "qwen2-tied": lambda: tiny_models.new_qwen2(tie_word_embeddings=True),
    "qwen2-one-kv-head": lambda: tiny_models.new_qwen2(num_key_value_heads=1),
    "qwen2vl": tiny_models.new_qwen2vl,
    "qwen3": lambda: tiny_models.new_decoder("Qwen3"),
    "llama": lambda: tiny_models.new_decoder("Llama", attention_bias=True, mlp_bias=True),
}


@pytest.fixture(scope="module", params=NEW_MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(request.param)
    return open_model(tiny_models.save_model(NEW_MODELS[request.param](), folder))


@pytest.fixture
def qwen2(qwen2_folder: Path) -> Model:
    return open_model(qwen2_folder)


def text(seed: int, count: int = 24) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(torch.randint(0, 256, (1, count), generator=generator))


def sample_of(model: Model) -> Sample:
    """Text, with six image tokens in it where the model sees."""
    plain = text(9)
    if model.config.vision is None:
        return plain
    image = torch.full((1, 6), tiny_models.IMAGE_TOKEN)
    ids = torch.cat([plain.input_ids[:, :7], image, plain.input_ids[:, 7:]], dim=1)
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    return Sample(ids, pixels, torch.tensor([[1, 4, 6]]))


def start_of(model: Model) -> Rotation:
    return make_rotations(
        model.family, method="hadamard", seed=3, vision=True, construction="layernorm"
    )


def learned(model: Model, how: Learning = HOW, **more: Any) -> Learned:
    samples = TextSamples((sample_of(model), text(1), text(2), text(3)))
    return learn_rotation(model, start_of(model), [samples], how, **more)


def test_the_loss_falls_the_matrices_are_orthogonal_and_no_output_changes(model: Model) -> None:
    found = learned(model)
    assert found.after < 0.97 * found.before
    assert len(found.losses) == HOW.steps
    rotation, start = found.rotation, start_of(model)
    check_rotation(rotation)
    for R, before in zip((rotation.R, *rotation.R_v), (start.R, *start.R_v), strict=True):
        assert float((R @ R.T - torch.eye(len(R))).abs().max()) < 1e-13
        assert float((R - before).abs().max()) > 1e-3
    if start.R_vit is not None:
        assert rotation.R_vit is not None
        assert torch.equal(rotation.R_vit, start.R_vit)
    sample = sample_of(model)
    exact = logits(load_module(model, dtype=torch.float64), sample)
    turned = rotated_tensors(model, fit_rotations(rotation, model.family), dtype=torch.float64)
    error = (logits(load_module(model, turned, torch.float64), sample) - exact).abs().max()
    assert float(error / exact.abs().max()) <= FLOAT64_LIMIT


@pytest.mark.parametrize("target", ["mllm-v1-text", "mllm-v1-vl"])
def test_what_is_learned_on_is_what_the_runtime_computes(
    model: Model, target: str, tmp_path: Path
) -> None:
    """The model inside the graph against the simulation of the int8 file that the same rotation
    and ranges make: each linear gives what the simulated one does with the same input."""
    file, sample = start_of(model), sample_of(model)
    language = TurnedLanguage(model, target, [sample])
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for linear in language.linears:
        linear.register_forward_hook(_noting(seen))
    turns = Turns(file.R, torch.stack(file.R_v))
    language.turn(turns)
    with torch.no_grad():
        found = language.run(turns, language.runs[0]) @ language.head.T

    ranges = _ranges(language, seen)
    layout = Int8Layout(frozenset(ranges), ranges, quant_bias=False)
    tensors = rotated_tensors(model, fit_rotations(file, model.family))
    write_int8(tmp_path / "int8.pth", tensors, tensors.names(), layout)
    variant = open_variant(tmp_path / "int8.pth", model.family)
    module = load_module(model, variant.tensors)
    simulate(module, model.family, variant, target)
    static = [each for each in module.modules() if isinstance(each, StaticLinear)]
    assert len(static) == len(language.linears) == 14
    for one, other in zip(language.linears, static, strict=True):
        x, y = seen[one.linear.name]
        differs = (other(x) - y).abs() > 1e-5 * y.abs().max()
        # A value on the border between two levels may fall to either side.
        assert float(differs.float().mean()) < 0.005, one.linear.name
    # Such values go on to other tokens; all together they are little beside what int8 costs.
    expected = logits(module, sample)
    noise = (expected - logits(load_module(model), sample)).square().mean()
    assert float((found - expected).square().mean()) < 0.1 * float(noise)


def _noting(seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
    def note(linear: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen[linear.linear.name] = (inputs[0], output)

    return note


def _ranges(
    language: TurnedLanguage, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, LinearScales]:
    """The maxima of what was seen. An output was quantized already: that keeps its maximum."""
    found = {}
    for linear in language.linears:
        x, y = seen[linear.linear.name]
        y = y if linear.bias is None else y - linear.bias
        sides = (ActivationScale(float(side.abs().max()), clip=True) for side in (x, y))
        found[linear.linear.name] = LinearScales(*sides)
    return found


def test_the_float_model_inside_the_graph_is_the_float_model(model: Model) -> None:
    """The states that it aims at give the model's own logits."""
    sample = sample_of(model)
    language = TurnedLanguage(model, "mllm-v1-text", [sample])
    expected = logits(load_module(model), sample)
    torch.testing.assert_close(
        language.runs[0].final @ language.head.T, expected, rtol=0, atol=1e-4
    )


def test_the_gradient_of_the_kl_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    head, found, wanted = (
        torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (50, 7, 7)
    )
    found.requires_grad_()
    ours, theirs = ((states @ head.T).log_softmax(-1) for states in (found, wanted))
    loss = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    loss.backward()
    value, gradient = kl_and_gradient(head, found.detach(), wanted)
    assert value == pytest.approx(float(loss), rel=1e-12)
    torch.testing.assert_close(gradient, found.grad)


def test_one_seed_gives_one_rotation_and_another_another(qwen2: Model) -> None:
    one, again = learned(qwen2), learned(qwen2)
    other = learned(qwen2, replace(HOW, seed=1))
    assert torch.equal(one.rotation.R, again.rotation.R)
    assert one.losses == again.losses
    assert not torch.equal(one.rotation.R, other.rotation.R)


def test_a_killed_run_goes_on_at_its_last_step_and_ends_the_same(
    qwen2: Model, tmp_path: Path
) -> None:
    def kill_at_four(done: float, total: float, unit: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(qwen2, folder=tmp_path, progress=kill_at_four)
    told: list[tuple[float, float, str]] = []
    resumed = learned(qwen2, folder=tmp_path, progress=lambda *each: told.append(each))
    assert told == [(4, 6, "steps"), (5, 6, "steps"), (6, 6, "steps")]
    whole = learned(qwen2)
    assert torch.equal(resumed.rotation.R, whole.rotation.R)
    assert resumed.losses == whole.losses


def test_weights_that_gptq_will_round_are_learned_on_in_float(qwen2: Model) -> None:
    rounded, plain = learned(qwen2), learned(qwen2, replace(HOW, weights=False))
    assert plain.before < rounded.before
    assert plain.after < plain.before


def test_what_does_not_pay_is_not_taken(qwen2: Model) -> None:
    """One step of a whole radian forgets the start: it stays where that is the better one."""
    for seed in range(4):
        found = learned(qwen2, replace(HOW, steps=1, rate=1.0, seed=seed))
        kept_start = torch.equal(found.rotation.R, start_of(qwen2).R)
        assert kept_start == (found.after >= found.before)
        assert ("learned" in found.rotation.metadata) != kept_start


def test_a_sample_that_predicts_nothing_is_refused_by_its_name(qwen2: Model) -> None:
    samples = TextSamples((text(0), replace(text(0, count=1), origin="book.txt, window 1")))
    with pytest.raises(ModelError, match=r"book\.txt, window 1: is one token"):
        learn_rotation(qwen2, start_of(qwen2), [samples], HOW)
