"""Which of several random rotations quantizes best, by the loss of a plain static int8 model.

Seeds differ by half a per cent of perplexity and more. Each rotation is judged as the cheapest
recipe would use it: ranges at the maximum, weights rounded to the nearest, on the samples that
the ranges were taken on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from buildsys.models.profile import profile
from buildsys.models.rotated import rotated_tensors
from buildsys.models.runtime import load_module
from buildsys.models.scoring import score_text
from buildsys.models.simulate import StaticLinear, quantizers_of
from buildsys.models.variant import StaticRanges
from buildsys.quant.int8 import quantize_weight

if TYPE_CHECKING:
    from buildsys.models.open import Model
    from buildsys.models.rotations import Rotations
    from buildsys.models.samples import Samples


@torch.inference_mode()
def int8_loss(model: Model, rotations: Rotations, samples: Sequence[Samples], target: str) -> float:
    """Mean -log p (nats) of the samples' tokens under static int8 of the turned model.

    The language model alone is quantized. Memory: the whole model in float32.
    """
    module: Any = load_module(model, rotated_tensors(model, rotations))
    statistics = profile(model.family, module, samples)
    ranges = {
        name: StaticRanges(both.input.ori, both.output.ori, True, True, False)
        for name, both in statistics.items()
        if model.family.linears[name].quantized and model.family.linears[name].tower == "language"
    }
    for name in ranges:
        path = _path(module, name)
        child = module.get_submodule(path)
        made = quantize_weight(child.weight, name=name)
        child.weight = torch.nn.Parameter(made.values * made.scale, requires_grad=False)
        quantizers = quantizers_of(model.family.linears[name], model.family, ranges, target)
        parent, _, attribute = path.rpartition(".")
        setattr(module.get_submodule(parent), attribute, StaticLinear(child, quantizers))
    scores = [score for part in samples for score in score_text(module, part)]
    return sum(s.nll for s in scores) / sum(s.predictions for s in scores)


def _path(module: Any, name: str) -> str:
    """Where transformers keeps a language linear: below `language_model` in multimodal models."""
    if hasattr(module.model, "language_model"):
        return name.replace("model.", "model.language_model.", 1)
    return name


def choose_seed(
    seeds: Sequence[int],
    loss: Callable[[int], float],
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> tuple[int, dict[int, float]]:
    """The seed with the least loss, the first of equal ones, and the losses of all."""
    losses = {}
    for done, seed in enumerate(seeds):
        progress(done, len(seeds), "rotations")
        losses[seed] = loss(seed)
    progress(len(seeds), len(seeds), "rotations")
    return min(seeds, key=losses.__getitem__), losses
