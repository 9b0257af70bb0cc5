"""What the outliers are aimed by: energy of the residual stream, loudness of the hidden units."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from training.batches import Sampler
from training.packed import run_batches
from training.questions import KINDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SEED = 17


@dataclass(frozen=True)
class ResidualStatistics:
    """covariance [hidden, hidden] float64: second moment of the normalized residual, over all
    decoder norms; loudness [layers, intermediate]: absmax of down_proj's input channels."""

    covariance: torch.Tensor
    loudness: torch.Tensor


@dataclass(frozen=True)
class ChannelStatistics:
    """residual [hidden, hidden]: second moment of the normalized residual, over all norms of the
    decoder and the last; values [layers, kv heads, head_dim, head_dim]: of the values; typical
    [layers, 2]: mean square of the residual at each layer's two norms. float64."""

    residual: torch.Tensor
    values: torch.Tensor
    typical: torch.Tensor


def channel_statistics(
    model: Qwen2VLForConditionalGeneration, tokenizer: "Tokenizer"
) -> ChannelStatistics:
    """Measure on fresh pictures and text, the two counting alike."""
    language, config = model.model.language_model, model.config.text_config
    heads = config.num_key_value_heads
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    residual = torch.zeros(hidden, hidden, dtype=torch.float64)
    values = torch.zeros(len(language.layers), heads, head_dim, head_dim, dtype=torch.float64)
    typical = torch.zeros(len(language.layers), 2, dtype=torch.float64)

    def see_residual(place: tuple[int, int] | None, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).double()
        squares = rows.square().mean(-1, keepdim=True)
        residual.add_((rows / squares).T @ rows / len(rows))
        if place is not None:
            typical[place] += squares.mean() / 2

    def see_values(layer: int, output: torch.Tensor) -> None:
        rows = output.double().reshape(-1, heads, head_dim)
        values[layer] += torch.einsum("nhd,nhe->hde", rows, rows) / len(rows)

    hooks = [language.norm.register_forward_pre_hook(lambda _, inputs: see_residual(None, inputs))]
    for index, layer in enumerate(language.layers):
        for side, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            hooks.append(
                norm.register_forward_pre_hook(
                    lambda _, inputs, place=(index, side): see_residual(place, inputs)
                )
            )
        hooks.append(
            layer.self_attn.v_proj.register_forward_hook(
                lambda _, __, output, index=index: see_values(index, output)
            )
        )
    sampler = Sampler(tokenizer, _SEED, 100_000)
    try:
        run_batches(model, [sampler.pictures(16, KINDS), sampler.texts(8, 512)])
    finally:
        for hook in hooks:
            hook.remove()
    return ChannelStatistics(residual, values, typical)


def residual_statistics(
    model: Qwen2VLForConditionalGeneration, tokenizer: "Tokenizer"
) -> ResidualStatistics:
    """Measure on fresh pictures and text."""
    layers = model.model.language_model.layers
    hidden = model.config.text_config.hidden_size
    covariance = torch.zeros(hidden, hidden, dtype=torch.float64)
    loudness = torch.zeros(len(layers), model.config.text_config.intermediate_size)
    count = 0

    def see_residual(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        rows = inputs[0].flatten(0, 1).double()
        rows = rows * rows.square().mean(-1, keepdim=True).rsqrt()
        covariance.add_(rows.T @ rows)
        count += len(rows)

    def see_units(layer: int, inputs: tuple[torch.Tensor, ...]) -> None:
        loudness[layer] = loudness[layer].maximum(inputs[0].abs().amax((0, 1)))

    hooks = []
    for index, layer in enumerate(layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_pre_hook(see_residual))
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, inputs, index=index: see_units(index, inputs)
            )
        )
    sampler = Sampler(tokenizer, _SEED, 100_000)
    try:
        run_batches(model, [sampler.pictures(16, KINDS), sampler.texts(8, 512)])
    finally:
        for hook in hooks:
            hook.remove()
    return ResidualStatistics(covariance / count, loudness)
