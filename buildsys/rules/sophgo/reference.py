"""What a model gives in float32 for one prompt: the measure of its bmodels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from buildsys.errors import StepError
from buildsys.models.key_layout import to_classic
from buildsys.models.runtime import load_module, model_inputs, position_ids
from buildsys.models.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor, nn

    from buildsys.models.open import Model
    from buildsys.rules.spec import StepContext


@dataclass(frozen=True)
class Reference:
    """One prompt, greedily continued. tokens: what each position from the prompt's last on leads
    to [1 + steps]. layers: what each layer gives [n + steps, hidden], the last one's normed.
    vision: the image's tokens, or None. sample: prompt and continuation."""

    sample: Sample
    prompt: int
    tokens: Tensor
    positions: Tensor
    layers: list[Tensor]
    vision: Tensor | None
    embeddings: Tensor


def prompt_of(step: StepContext, model: Model) -> Sample:
    """The sample that is run: the first question of `images`, else the first tokens of `text`."""
    from buildsys.models.image_samples import image_samples
    from buildsys.models.samples import open_samples

    pictures, text = step.maybe("images"), step.maybe("text")
    if pictures is not None:
        samples = image_samples(
            model,
            pictures.path,
            prompts=pictures.paths.get("prompts"),
            samples=1,
            size=pictures.options.get("size"),
        )
        return samples.sample(replace(samples.questions[0], answer=None))
    if text is None:
        raise StepError("there is nothing to run", remedy="Give `images` or `text`.")
    tokens = int(step.options["prompt_tokens"])
    first = next(iter(open_samples(model, text.kind, text.paths, {"samples": 1, "tokens": tokens})))
    return replace(first, input_ids=first.input_ids[:, :tokens])


@torch.inference_mode()
def run_reference(model: Model, tensors: Any, sample: Sample, steps: int) -> Reference:
    """Continue the prompt by `steps` tokens and keep what every layer gave."""
    module = load_module(model, tensors)
    prompt = sample.input_ids.shape[1]
    for _ in range(steps):
        chosen = module(**model_inputs(module, sample)).logits[0, -1].argmax().reshape(1, 1)
        sample = replace(sample, input_ids=torch.cat([sample.input_ids, chosen], dim=1))
    backbone: Any = module.model
    with _kept_outputs(module) as kept:
        inputs = model_inputs(module, sample)
        last = backbone(**inputs).last_hidden_state[0]
    layers = [kept[f"model.layers.{index}"] for index in range(model.config.num_hidden_layers)]
    head: Any = module.lm_head
    return Reference(
        sample=sample,
        prompt=prompt,
        tokens=head(last[prompt - 1 :]).argmax(dim=1),
        positions=position_ids(module, sample).reshape(-1, prompt + steps),
        layers=[*layers[:-1], last],
        vision=kept.get("visual.merger"),
        embeddings=kept["model.embed_tokens"],
    )


@contextmanager
def _kept_outputs(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What modules give while the block runs, by their classic names; without the batch."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            kept[name] = made[0] if made.dim() == 3 else made

        return hook

    hooks = [
        each.register_forward_hook(keep(to_classic(name)))
        for name, each in module.named_modules()
        if _is_kept(to_classic(name))
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _is_kept(name: str) -> bool:
    words = name.split(".")
    is_layer = len(words) == 3 and words[:2] == ["model", "layers"]
    return is_layer or name in ("visual.merger", "model.embed_tokens")


def patch_positions(sample: Sample, merge: int) -> Tensor:
    """Row and column [patches, 2] of every patch of the sample's one image, in the order in which
    the processor gives them: merge x merge patches of a token together."""
    assert sample.image_grid_thw is not None
    frames, rows, columns = (int(n) for n in sample.image_grid_thw[0])
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    split = grid.reshape(2, rows // merge, merge, columns // merge, merge)
    places = split.permute(1, 3, 2, 4, 0).reshape(-1, 2)
    return places.repeat(frames, 1)
