"""Every kind of rescaling leaves the function as it is: biases, shared heads and RoPE included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.formats.rotation_file import save_rotation
from buildsys.models.balanced import balance_by_activations
from buildsys.models.errors import ModelError
from buildsys.models.open import open_model
from buildsys.models.rescaling import (
    EXACT,
    PairKind,
    balance_by_weights,
    check_pairs,
    exact_factors,
    factors_of_linears,
)
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import Rotations, load_rotations, make_rotations
from buildsys.models.runtime import load_module, logits
from tests import tiny_models
from tests.models.test_profile_layers import pictures, texts

FIRST_MLP = "model.layers.0.mlp"
EVERY: tuple[Sequence[PairKind], ...] = (("up-down",), ("v-o",), ("q-k",), EXACT)


def rotations_of(folder: Path, tmp_path: Path) -> Rotations:
    family = open_model(folder).family
    path = tmp_path / "rotation.bin"
    save_rotation(
        path,
        make_rotations(family, method="auto", seed=1, vision=False, construction="layernorm"),
    )
    return load_rotations(path, family)


class _Changed:
    """A source in which one tensor is another."""

    def __init__(self, source: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]):
        self._source, self._name, self._change = source, name, change

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._source, attribute)

    def read(self, name: str) -> torch.Tensor:
        made: torch.Tensor = self._source.read(name)
        return self._change(made) if name == self._name else made


def largest_change(folder: Path, samples: Any, rescale: Any, rotations: Any = None) -> float:
    """Of a logit, relative to the largest, in float64."""
    model = open_model(folder)
    plain = load_module(model, dtype=torch.float64)
    tensors = rotated_tensors(model, rotations, rescale=rescale, dtype=torch.float64)
    module = load_module(model, tensors, torch.float64)
    changes = []
    for sample in samples:
        expected = logits(plain, sample)
        changes.append(
            float((logits(module, sample) - expected).abs().max() / expected.abs().max())
        )
    return max(changes)


@pytest.mark.parametrize("pairs", EVERY, ids="+".join)
@pytest.mark.parametrize("turned", [False, True])
def test_by_weights_nothing_changes_but_the_weights(
    qwen2_folder: Path, tmp_path: Path, pairs: Sequence[PairKind], turned: bool
) -> None:
    """The tiny model has random biases, two query heads on each kv head, and RoPE."""
    model = open_model(qwen2_folder)
    rotations = rotations_of(qwen2_folder, tmp_path) if turned else None
    tensors = rotated_tensors(model, rotations)
    rescale = dict(balance_by_weights(model.family, tensors, pairs, powers_of_two=False))
    assert largest_change(qwen2_folder, texts(), rescale, rotations) < 1e-6
    moved = rotated_tensors(model, rotations, rescale=rescale)
    for name in factors_of_linears(rescale, model.family):
        assert not torch.allclose(moved.read(f"{name}.weight"), tensors.read(f"{name}.weight"))


def test_by_activations_nothing_changes_but_the_weights(qwen2_folder: Path, tmp_path: Path) -> None:
    model = open_model(qwen2_folder)
    factors = balance_by_activations(
        model, rotated_tensors(model), [texts()], tmp_path, EXACT,
        target="mllm-v1-vl", powers_of_two=True,
    )  # fmt: skip
    rescale = dict(factors)
    assert len(rescale) == 3 * 2
    assert all(torch.equal(torch.log2(s), torch.log2(s).round()) for s in rescale.values())
    assert largest_change(qwen2_folder, texts(), rescale) < 1e-6


def test_gate_up_divides_rows_of_gate_and_up_and_is_left_out_of_what_is_exact(
    qwen2_folder: Path, tmp_path: Path
) -> None:
    model = open_model(qwen2_folder)
    tensors = rotated_tensors(model)
    far = f"{FIRST_MLP}.gate_proj.weight"
    reaching = _Changed(tensors, far, lambda W: torch.cat([W[:3], 40 * W[3:4], W[4:]]))
    factors = balance_by_activations(
        model, reaching, [texts()], tmp_path, ["up-down", "gate-up"],
        target="mllm-v1-text", powers_of_two=False,
    )  # fmt: skip
    rescale = dict(factors)
    assert len(rescale) == 3 * 2
    d, c = rescale[f"{FIRST_MLP}.gate_proj"], 1.0 / rescale[f"{FIRST_MLP}.up_proj"]
    assert float(d[3]) > 1.0
    assert float(c[3]) > 1.0
    assert int((d != 1.0).sum()) < len(d) // 4
    s = rescale[f"{FIRST_MLP}.down_proj"]
    of_linears = factors_of_linears(rescale, model.family)
    torch.testing.assert_close(of_linears[f"{FIRST_MLP}.up_proj"], s / c)
    moved = rotated_tensors(model, rescale=rescale)
    torch.testing.assert_close(
        moved.read(far).double(), tensors.read(far).double() / d[:, None], rtol=1e-6, atol=0
    )
    exact = exact_factors(rescale, model.family)
    assert set(exact) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    assert largest_change(qwen2_folder, texts(), exact) < 1e-6


def test_multimodal_rope_has_the_same_pairs(qwen2vl_folder: Path) -> None:
    model = open_model(qwen2vl_folder)
    tensors = rotated_tensors(model)
    rescale = dict(balance_by_weights(model.family, tensors, EXACT, powers_of_two=False))
    assert largest_change(qwen2vl_folder, pictures(), rescale) < 1e-6


def test_after_balancing_both_sides_have_equal_maxima(qwen2_folder: Path) -> None:
    model = open_model(qwen2_folder)
    rescale = dict(
        balance_by_weights(model.family, rotated_tensors(model), EXACT, powers_of_two=False)
    )
    moved = rotated_tensors(model, rescale=rescale)
    prefix = "model.layers.1.self_attn"
    v = moved.read(f"{prefix}.v_proj.weight").abs().amax(1)
    o = moved.read(f"{prefix}.o_proj.weight").abs().amax(0).view(2, 2, 16).amax(1).reshape(-1)
    torch.testing.assert_close(v, o)
    k = moved.read(f"{prefix}.k_proj.weight").abs().amax(1).view(2, 2, 8).amax(1)
    q = moved.read(f"{prefix}.q_proj.weight").abs().amax(1).view(2, 2, 2, 8).amax((1, 2))
    torch.testing.assert_close(k, q)


def test_factors_of_another_model_are_refused(qwen2_folder: Path) -> None:
    family = open_model(qwen2_folder).family
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"):
        with pytest.raises(ModelError, match="belong to no linear of this model"):
            factors_of_linears({name: torch.ones(5)}, family)


def test_heads_with_norms_of_their_own_take_no_q_k_factors(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tiny_models.new_decoder("Qwen3"), tmp_path)
    family = open_model(folder).family
    check_pairs(family, ["up-down", "v-o"])
    with pytest.raises(ModelError, match="q_norm"):
        check_pairs(family, EXACT)
