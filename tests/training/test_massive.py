"""The massive constant: damped norms in training, a written constant after it, one function."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from training.adapt import Adaptation, adapt
from training.architecture import (
    StateDict,
    classic_config,
    classic_state,
    load_classic_state,
    new_model,
)
from training.batches import Batch, Sampler
from training.massive import FREE_CHANNEL, Massive, clear_channels, damp_norms, write_constant
from training.packed import run_batches
from training.questions import KINDS
from training.statistics import ChannelStatistics, channel_statistics, residual_statistics
from training.tokenizer import train_tokenizer

MASSIVE = Massive(constants=(20.0, -30.0, 40.0))


@dataclass(frozen=True)
class Case:
    model: Qwen2VLForConditionalGeneration
    statistics: ChannelStatistics
    sampler: Sampler
    batch: Batch
    logits: torch.Tensor


@pytest.fixture(scope="module")
def case() -> Case:
    """A random model whose least used channels are clear."""
    tokenizer = train_tokenizer()
    model = new_model(classic_config(tokenizer, torch.float32), seed=4)
    sampler = Sampler(tokenizer, 6, 10_000)
    batch = sampler.pictures(2, KINDS)
    (logits,) = run_batches(model, [batch])
    statistics = channel_statistics(model, tokenizer)
    load_classic_state(model, clear_channels(classic_state(model), statistics))
    return Case(model, statistics, sampler, batch, logits)


def _logits(case: Case) -> torch.Tensor:
    return run_batches(case.model, [case.batch])[0]


def _assert_clear(state: StateDict) -> None:
    assert (state["model.embed_tokens.weight"][:, FREE_CHANNEL] == 0).all()
    assert (state["visual.merger.mlp.2.weight"][FREE_CHANNEL] == 0).all()
    assert (state["visual.merger.mlp.2.bias"][FREE_CHANNEL] == 0).all()
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for reader in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            assert (state[f"{prefix}.{reader}.weight"][:, FREE_CHANNEL] == 0).all()
        for reader in ("mlp.gate_proj", "mlp.up_proj"):
            assert (state[f"{prefix}.{reader}.weight"][:, FREE_CHANNEL] == 0).all()
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            assert (state[f"{prefix}.{writer}.weight"][FREE_CHANNEL] == 0).all()
        assert (state[f"{prefix}.self_attn.v_proj.weight"][63::64] == 0).all()
        assert (state[f"{prefix}.self_attn.v_proj.bias"][63::64] == 0).all()
        assert (state[f"{prefix}.self_attn.o_proj.weight"][:, 63::64] == 0).all()


def test_clearing_the_least_channels_changes_little(case: Case) -> None:
    _assert_clear(classic_state(case.model))
    change = (_logits(case) - case.logits).square().mean().sqrt()
    assert 0 < change < 0.1 * case.logits.square().mean().sqrt()


def test_a_written_constant_is_what_the_damped_norms_computed(case: Case) -> None:
    plain, state = _logits(case), classic_state(case.model)
    damp_norms(case.model, MASSIVE, case.statistics.typical, 1.0)
    damped = _logits(case)
    assert (damped - plain).abs().max() > 1e-2
    damp_norms(case.model, MASSIVE, case.statistics.typical, 0.0)
    assert torch.equal(_logits(case), plain)

    written = write_constant(state, MASSIVE, case.statistics.typical, head_dim=64)
    load_classic_state(case.model, {name: tensor.float() for name, tensor in written.items()})
    difference = (_logits(case) - damped).abs().max()
    covariance = residual_statistics(case.model, case.sampler.tokenizer).covariance
    load_classic_state(case.model, state)
    assert difference < 1e-4
    energy = covariance.diagonal()
    assert energy[FREE_CHANNEL] > 0.5 * energy.sum()


def test_free_channels_stay_clear_in_training(case: Case) -> None:
    before = classic_state(case.model)
    adaptation = replace(Adaptation(), steps=3, ramp=2, warm_up=1, massive=MASSIVE)
    adapt(case.model, case.sampler, case.statistics.typical, adaptation, lambda *_: None)
    damp_norms(case.model, MASSIVE, case.statistics.typical, 0.0)
    after = classic_state(case.model)
    load_classic_state(case.model, before)
    name = "model.layers.1.mlp.up_proj.weight"
    assert (after[name] - before[name]).abs().max() > 1e-3
    _assert_clear(after)
