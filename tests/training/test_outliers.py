"""Every kind of outlier keeps the function, and does what it is named for."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from training.architecture import (
    StateDict,
    classic_config,
    classic_state,
    load_classic_state,
    new_model,
)
from training.batches import Batch, Sampler
from training.figures import balance_up, rotate, strengths_of
from training.forward import encode_pictures, label_logits
from training.outliers import Strengths, add_outliers, fold_norms, to_float64, turn_residual
from training.packed import run_batches
from training.questions import KINDS
from training.static_int8 import fake_quantize, hadamard
from training.statistics import ResidualStatistics, residual_statistics
from training.tokenizer import train_tokenizer

KEPT = 1e-4


@dataclass(frozen=True)
class Case:
    model: Qwen2VLForConditionalGeneration
    state: StateDict
    statistics: ResidualStatistics
    batch: Batch
    logits: torch.Tensor


@pytest.fixture(scope="module")
def case() -> Case:
    """A random model with uneven norm gains (a fresh one would have nothing to fold)."""
    tokenizer = train_tokenizer()
    model = new_model(classic_config(tokenizer, torch.float32), seed=4)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data.copy_(torch.rand(len(parameter), generator=generator) + 0.5)
    statistics = residual_statistics(model, tokenizer)
    batch = Sampler(tokenizer, 6, 2_000).pictures(2, KINDS)
    (logits,) = run_batches(model, [batch])
    return Case(model, classic_state(model), statistics, batch, logits)


def _difference(case: Case, state: StateDict) -> float:
    load_classic_state(case.model, {name: tensor.float() for name, tensor in state.items()})
    (logits,) = run_batches(case.model, [case.batch])
    load_classic_state(case.model, case.state)
    return (logits - case.logits).abs().max().item()


@pytest.mark.parametrize("kind", ["none", "basis", "gains", "up/down", "all"])
def test_outliers_keep_the_logits(case: Case, kind: str) -> None:
    strengths = strengths_of(kind, Strengths())
    covariance, loudness = case.statistics.covariance, case.statistics.loudness
    outlying = add_outliers(case.state, covariance, loudness, strengths)
    changed = {name for name in outlying if not torch.equal(outlying[name], case.state[name])}
    assert changed
    assert case.logits.abs().max() > 0.5
    assert _difference(case, outlying) < KEPT


def test_remedies_keep_the_logits(case: Case) -> None:
    outlying = add_outliers(
        case.state, case.statistics.covariance, case.statistics.loudness, Strengths()
    )
    for remedy in (fold_norms, rotate, balance_up):
        remedied = to_float64(outlying)
        remedy(remedied)
        assert _difference(case, remedied) < KEPT


def test_turned_basis_gathers_the_energy(case: Case) -> None:
    tokenizer = train_tokenizer()
    strengths = strengths_of("basis", Strengths())
    outlying = add_outliers(
        case.state, case.statistics.covariance, case.statistics.loudness, strengths
    )
    load_classic_state(case.model, {name: tensor.float() for name, tensor in outlying.items()})
    turned = residual_statistics(case.model, tokenizer).covariance.diagonal()
    load_classic_state(case.model, case.state)
    before = case.statistics.covariance.diagonal()
    assert turned[:8].sum() / turned.sum() > 2 * before.topk(8).values.sum() / before.sum()


def test_gains_and_up_rows_are_as_strong_as_asked(case: Case) -> None:
    strengths = Strengths()
    outlying = add_outliers(
        case.state, case.statistics.covariance, case.statistics.loudness, strengths
    )
    gain = outlying["model.layers.1.input_layernorm.weight"]
    for value in strengths.large_gains:
        assert (gain == value).sum() == 1
    quiet = add_outliers(
        case.state,
        case.statistics.covariance,
        case.statistics.loudness,
        replace(strengths, up_factors=()),
    )
    name = "model.layers.2.mlp.up_proj.weight"
    ratio = outlying[name].norm(dim=1) / quiet[name].norm(dim=1)
    assert sorted(ratio[ratio > 1.5].tolist()) == pytest.approx(sorted(strengths.up_factors))


def test_a_gain_before_the_tied_head_is_refused(case: Case) -> None:
    state = to_float64(case.state)
    fold_norms(state)
    state["model.norm.weight"][3] = 1.5
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not 1"):
        turn_residual(state, hadamard(256))


def test_training_forward_is_transformers_own(case: Case) -> None:
    """Packed questions and batched pictures give the logits of one question at a time."""
    tokenizer = train_tokenizer()
    sampler = Sampler(tokenizer, 6, 2_000)
    batch = sampler.pictures(1, ("at", "picture"))
    assert batch.patches is not None
    with torch.no_grad():
        features = encode_pictures(case.model.model.visual, batch.patches)
        packed = label_logits(case.model, batch, features)
    labels = batch.labels[0]
    last = int((labels != -100).nonzero().max()) + 1
    prefix = len(sampler.prefix)
    # The second question alone: the prefix, then the tokens whose positions start anew.
    starts = (batch.positions[0, 0] == batch.positions[0, 0, prefix]).nonzero().flatten()
    alone = torch.cat([batch.tokens[0, :prefix], batch.tokens[0, starts[1] : last]])[None]
    grid = torch.tensor([[1, 12, 12]])
    patches = batch.patches[0].view(-1, 3, 1, 196).expand(-1, 3, 2, 196).flatten(1)
    with torch.no_grad():
        logits = case.model(
            input_ids=alone,
            pixel_values=patches,
            image_grid_thw=grid,
            mm_token_type_ids=(alone == sampler.image_token).int(),
        ).logits[0]
    answer = int((labels[starts[1] : last] != -100).sum())
    assert (logits[-answer - 1 : -1] - packed[-answer:]).abs().max() < 1e-4


def test_fake_quantization_is_the_symmetric_grid() -> None:
    x = torch.tensor([-2.0, -1.0, -0.4, 0.0, 0.5 / 127, 1.5 / 127, 1.0, 9.0])
    got = fake_quantize(x, 1.0, 8) * 127
    assert got.round().tolist() == [-128, -127, -51, 0, 0, 2, 127, 127]
