"""Outliers of real language models, made on purpose by changes that keep the function.

Trained small models are easy to quantize; large ones are not, because a few residual channels,
a few norm gains and a few hidden units carry values far above the rest. Each change below is an
identity in exact arithmetic, done in float64, and each has its own remedy:

    turn_residual   energy gathers in few channels       undone by a Hadamard rotation
    unfold_gains    norm weights of very unequal size    undone by norm fusion
    scale_up_rows   up_proj rows up, down_proj down      undone by up/down rescaling

All weights are under classic names. The final norm's weight must be 1: a gain there cannot be
folded into a tied head, and without folding the residual basis cannot be turned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

StateDict = dict[str, torch.Tensor]
_NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Strengths:
    """How strong each kind of outlier is made; a strength of none leaves the kind out."""

    turn: bool = True
    gain_spread: float = 0.6  # sigma of the log-normal norm gains
    large_gains: tuple[float, ...] = (128.0, 64.0, 32.0)  # gains of single channels, per norm
    up_factors: tuple[float, ...] = (32.0, 32.0, 16.0, 16.0)  # powers of two, per layer


def to_float64(state: StateDict) -> StateDict:
    """A copy in float64."""
    return {name: tensor.to(torch.float64) for name, tensor in state.items()}


def layer_count(state: StateDict) -> int:
    """Number of decoder layers."""
    return sum(name.endswith("input_layernorm.weight") for name in state)


def _norms(state: StateDict) -> list[tuple[str, list[str]]]:
    """Each decoder norm's weight name and the weight names of the linears that read it."""
    pairs = []
    for layer in range(layer_count(state)):
        prefix = f"model.layers.{layer}."
        for norm, readers in _NORM_READERS.items():
            names = [f"{prefix}{reader}.weight" for reader in readers]
            pairs.append((f"{prefix}{norm}.weight", names))
    return pairs


def fold_norms(state: StateDict) -> None:
    """Fold the decoder's norm gains into the linears behind them: W <- W diag(g), g <- 1."""
    for norm, readers in _norms(state):
        for reader in readers:
            state[reader] = state[reader] * state[norm]
        state[norm] = torch.ones_like(state[norm])


def unfold_gains(state: StateDict, gains: Sequence[torch.Tensor]) -> None:
    """The inverse: norm weights become `gains` (one [hidden] per norm), W <- W diag(1/g)."""
    for (norm, readers), gain in zip(_norms(state), gains, strict=True):
        for reader in readers:
            state[reader] = state[reader] * (state[norm] / gain)
        state[norm] = gain.clone()


def uneven_gains(
    count: int, energy: torch.Tensor, strengths: Strengths, seed: int
) -> list[torch.Tensor]:
    """Log-normal gains with a few large ones on channels of middling energy, `count` x [hidden].

    Middling, because a large gain on the loudest channel would be the first kind of outlier
    over again, and one on a silent channel would not be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = len(energy)
    order = energy.argsort(descending=True)
    middle = order[hidden // 16 : hidden // 4]
    gains = []
    for _ in range(count):
        noise = torch.randn(hidden, generator=generator, dtype=torch.float64)
        gain = (strengths.gain_spread * noise).exp()
        picked = torch.randperm(len(middle), generator=generator)
        for channel, value in zip(middle[picked], strengths.large_gains, strict=False):
            gain[channel] = value
        gains.append(gain)
    return gains


def turn_residual(state: StateDict, basis: torch.Tensor) -> None:
    """Turn the residual stream: r <- r Q, for an orthogonal Q [hidden, hidden]; norms folded."""
    for norm, _ in _norms(state):
        if not torch.equal(state[norm], torch.ones_like(state[norm])):
            raise ValueError(f"{norm} is not 1: fold the norms before the residual is turned")
    final = state["model.norm.weight"]
    if not torch.equal(final, torch.ones_like(final)):
        raise ValueError("model.norm.weight is not 1: train with the final norm frozen")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ basis
    for _, readers in _norms(state):
        for reader in readers:
            state[reader] = state[reader] @ basis
    for layer in range(layer_count(state)):
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{writer}.weight"
            state[name] = basis.T @ state[name]
    state["visual.merger.mlp.2.weight"] = basis.T @ state["visual.merger.mlp.2.weight"]
    state["visual.merger.mlp.2.bias"] = state["visual.merger.mlp.2.bias"] @ basis


def principal_basis(covariance: torch.Tensor) -> torch.Tensor:
    """Orthogonal basis whose first channels carry most of the energy, float64 [hidden, hidden]."""
    values, vectors = torch.linalg.eigh(covariance.to(torch.float64))
    basis: torch.Tensor = vectors[:, values.argsort(descending=True)].contiguous()
    return basis


def scale_up_rows(state: StateDict, layer: int, rows: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply rows of up_proj and divide the columns of down_proj that they feed.

    SwiGLU is linear in up_proj's output, so the layer's function stays; the outputs of these
    rows, and the inputs of down_proj behind them, grow by the factors (powers of two are exact
    in any floating-point type).
    """
    up, down = (f"model.layers.{layer}.mlp.{name}.weight" for name in ("up_proj", "down_proj"))
    state[up], state[down] = state[up].clone(), state[down].clone()
    state[up][rows] *= factors[:, None]
    state[down][:, rows] /= factors


def add_outliers(
    state: StateDict, covariance: torch.Tensor, loudness: torch.Tensor, strengths: Strengths
) -> StateDict:
    """All kinds of outliers, as strong as `strengths` says; returns float64.

    covariance: second moment of the normalized residual over samples, [hidden, hidden].
    loudness: absmax of down_proj's input channels over samples, [layers, intermediate]; the
    loudest units of each layer are the ones made louder still.
    """
    state = to_float64(state)
    fold_norms(state)
    covariance = covariance.to(torch.float64)
    if strengths.turn:
        basis = principal_basis(covariance)
        turn_residual(state, basis)
        covariance = basis.T @ covariance @ basis
    if strengths.large_gains or strengths.gain_spread:
        norms = _norms(state)
        unfold_gains(state, uneven_gains(len(norms), covariance.diagonal(), strengths, seed=1))
    if strengths.up_factors:
        factors = torch.tensor(strengths.up_factors, dtype=torch.float64)
        for layer in range(layer_count(state)):
            rows = loudness[layer].argsort(descending=True)[: len(factors)]
            scale_up_rows(state, layer, rows, factors)
    return state
