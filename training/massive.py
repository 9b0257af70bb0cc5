"""A massive constant in the residual stream, as large language models have it.

In trained language models a few fixed directions of the residual stream carry values hundreds
of times larger than all others, from an early layer to one of the last (Dettmers et al. 2022,
LLM.int8; Sun et al. 2024, Massive Activations). No exact change can give them to a finished
small model, because RMSNorm divides by them. So the model is made used to them:

- the least used residual channel, and the least used value channel of each head, are cleared in
  all that reads or writes them (`clear_channels`). Both of their gradients are zero from then
  on, so they stay clear in training;
- in a second, short training the norms divide by sqrt(mean(r^2) + E) instead of sqrt(mean(r^2)),
  with an E that grows (`damp_norms`). That is what RMSNorm computes where the free channel
  carries a constant c = sqrt(E * hidden);
- then the constant is written for real (`write_constant`): attention weights sum to 1, so a
  value bias reaches every token as it is, and o_proj puts it into the free channel. The last
  layer takes it out again. This is exact, and the norms are RMSNorm as it always was.

An option of training.train, `--massive`: it makes qwen2vl-tiny-massive (qwen2vl-tiny is without).
Measured, 3 CPU-minutes later: as good as before (99.4 % of the 1,000 questions); static int8
breaks it where the constant lies in one channel, and rotation repairs that. But the rotated model
is harder to quantize to 4 bits, because the errors of all weights meet the constant, and in
float32 it is less exact than before the rotation (with the whole constant, not the 0.8 of it that
is shipped: 93.5 % in Q4_K, and a sixth of the exactness).
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from training.outliers import StateDict, fold_norms, layer_count, to_float64, turn_residual
from training.static_int8 import hadamard, random_signs
from training.statistics import ChannelStatistics

FREE_CHANNEL = 0


@dataclass(frozen=True)
class Massive:
    """The constant behind the attention of each layer but the last, which takes it out again.

    It changes its sign, so that what the attentions write is massive, too. weight: of o_proj's
    entries that write it; the value biases follow from it.
    """

    constants: tuple[float, ...] = (768.0, -1728.0, 2368.0)
    weight: float = 1.75


def _last_of_each_head(width: int, head_dim: int) -> slice:
    """The free value channels."""
    return slice(head_dim - 1, width, head_dim)


def _clear(name: str, tensor: torch.Tensor, head_dim: int) -> None:
    """Zero what a tensor reads from free channels or writes to them, in place."""
    part = name.split(".")[-2]
    if part in {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens"} and (
        tensor.ndim == 2
    ):
        tensor[:, FREE_CHANNEL] = 0
    if part in {"o_proj", "down_proj"} or name.startswith("visual.merger.mlp.2."):
        tensor[FREE_CHANNEL] = 0
    if part == "v_proj":
        tensor[_last_of_each_head(len(tensor), head_dim)] = 0
    if part == "o_proj":
        tensor[:, _last_of_each_head(tensor.shape[1], head_dim)] = 0


def clear_channels(state: StateDict, statistics: ChannelStatistics) -> StateDict:
    """Turn residual and values so that their least used direction is a channel, and clear it.

    Returns float32, norms folded. Not exact: what the least directions carried is lost.
    """
    state = to_float64(state)
    fold_norms(state)
    # eigh's order is ascending: channel 0 is the least.
    turn_residual(state, torch.linalg.eigh(statistics.residual).eigenvectors)
    for layer, values in enumerate(statistics.values):
        turn_values(state, layer, torch.linalg.eigh(values).eigenvectors.flip(-1))
    for name, tensor in state.items():
        if not name.endswith("norm.weight"):
            _clear(name, tensor, statistics.values.shape[-1])
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def turn_values(state: StateDict, layer: int, bases: torch.Tensor) -> None:
    """Turn the values of each key-value head by an orthogonal matrix, and o_proj back. Exact.

    bases: [kv heads, head_dim, head_dim].
    """
    prefix = f"model.layers.{layer}.self_attn"
    head_dim = bases.shape[-1]
    for name in (f"{prefix}.v_proj.weight", f"{prefix}.v_proj.bias"):
        rows = state[name].reshape(len(bases), head_dim, *state[name].shape[1:])
        state[name] = torch.einsum("hd...,hde->he...", rows, bases).flatten(0, 1)
    out = f"{prefix}.o_proj.weight"
    columns = state[out].reshape(len(state[out]), len(bases), -1, head_dim)
    state[out] = torch.einsum("chgd,hde->chge", columns, bases).flatten(1)


def _damped(norm: Qwen2VLRMSNorm, energy: float, typical: float, x: torch.Tensor) -> torch.Tensor:
    rows = x.float()
    root = torch.rsqrt(rows.square().mean(-1, keepdim=True) + energy + norm.variance_epsilon)
    damped: torch.Tensor = norm.weight * ((1 + energy / typical) ** 0.5 * root * rows).to(x.dtype)
    return damped


def damp_norms(
    model: Qwen2VLForConditionalGeneration,
    massive: Massive,
    typical: torch.Tensor,
    share: float,
) -> None:
    """From now on the norms divide as if `share` of the constants were there; 0 undoes it.

    typical: mean square of the residual at each layer's two norms, [layers, 2]: the scale at
    which the norms' outputs stay what they were.
    """
    layers = model.model.language_model.layers
    hidden = model.config.text_config.hidden_size
    for index, constant in enumerate(massive.constants):
        energy = (share * constant) ** 2 / hidden
        seen = (
            (layers[index].post_attention_layernorm, typical[index, 1]),
            (layers[index + 1].input_layernorm, typical[index + 1, 0]),
        )
        for norm, scale in seen:
            norm.__dict__.pop("forward", None)
            if share > 0:
                norm.__dict__["forward"] = partial(_damped, norm, energy, float(scale))


def write_constant(
    state: StateDict, massive: Massive, typical: torch.Tensor, head_dim: int
) -> StateDict:
    """Weights whose RMSNorm divides by a constant that is there, instead of by a damped norm's.

    Exact. Takes weights as trained under `damp_norms` at share 1; returns float64, norms folded,
    and the values in a random basis, so that their biases lie in no single channel.
    """
    state = to_float64(state)
    hidden = len(state["model.norm.weight"])
    for index, constant in enumerate(massive.constants):
        for name, scale in (
            (f"model.layers.{index}.post_attention_layernorm.weight", typical[index, 1]),
            (f"model.layers.{index + 1}.input_layernorm.weight", typical[index + 1, 0]),
        ):
            # The damped norm's own factor becomes part of the gain.
            state[name] = state[name] * (1 + constant**2 / hidden / float(scale)) ** 0.5
    fold_norms(state)
    levels = (0.0, *massive.constants, 0.0)
    for layer in range(layer_count(state)):
        _write_step(state, layer, levels[layer + 1] - levels[layer], massive.weight, head_dim)
    return state


def _write_step(state: StateDict, layer: int, step: float, weight: float, head_dim: int) -> None:
    """Add `step` to the free channel of every token, in the attention of one layer."""
    prefix = f"model.layers.{layer}.self_attn"
    bias, out = state[f"{prefix}.v_proj.bias"], state[f"{prefix}.o_proj.weight"]
    width = out.shape[1]
    # Both stand in one channel of each head; the turn shares them out among all of the head's.
    level = abs(step) / (width * weight) * head_dim**0.5
    bias[_last_of_each_head(len(bias), head_dim)] = level
    out[FREE_CHANNEL, _last_of_each_head(width, head_dim)] = step * head_dim / (width * level)
    turn = hadamard(head_dim) * random_signs(head_dim, seed=layer)[:, None]
    turn_values(state, layer, turn.expand(len(bias) // head_dim, -1, -1))
