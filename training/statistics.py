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
