"""What a Qwen2-VL's two halves are fed: the arrays that an NPU compiler calibrates with.

The language model reads the prompt's embeddings with the image's merged tokens in their places
(the prefill call); the vision encoder reads the image itself, in the compiler's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from buildsys.models.errors import ModelError
from buildsys.models.open import Model
from buildsys.models.patch_grid import merged_image, patch_grid
from buildsys.models.runtime import load_module, model_inputs
from buildsys.models.samples import Sample

Part = Literal["language", "vision"]

# One prompt per aspect of an image, in turn: the activations of a single question are narrow.
# The aspects are those of the vendor's tutorial; the wording is ours.
PROMPTS: Mapping[str, str] = {
    "short_answer": "In one or two words, what is the main subject of this picture?",
    "detailed_description": "Give a full description of everything that can be seen here.",
    "object_identification": "Name each object that you recognise in the picture.",
    "scene_understanding": "What kind of scene is this, and in what setting?",
    "visual_reasoning": "What is going on here, and what makes you think so?",
    "counting": "How many things of each kind are there? List them with their numbers.",
    "spatial_reasoning": "Where are the things in relation to one another?",
    "technical_description": "Describe structure, construction and design of what is shown.",
    "color_texture": "Which colours, patterns and surfaces do you notice?",
    "comparison": "Which contrasts and similarities are there between the things shown?",
    "purpose_function": "What are the things in this picture for?",
    "environment_context": "Describe the surroundings: place, weather, season, time of day.",
    "detailed_analysis": "Analyse the picture thoroughly, from its whole to its details.",
    "characteristics": "What are the most telling features of the main subject?",
    "composition": "How is the picture composed: foreground, background, balance, lines?",
    "action_activity": "Is anybody or anything doing something? Describe the action.",
    "categorization": "To which category does this picture belong, and why?",
    "materials": "Of which materials and substances are the things made?",
    "lighting_atmosphere": "Describe light, shadows and the mood that they make.",
    "perspective": "From which viewpoint and at what distance was this taken?",
}


def embedding_module(model: Model, dtype: torch.dtype) -> nn.Module:
    """transformers' module of a Qwen2-VL without its decoder layers, which prefill inputs do
    not depend on. Raises ModelError for a model without a vision tower."""
    if model.config.vision is None:
        message = f"a {model.config.model_type} sees no images"
        raise ModelError(message, file=model.config.file, remedy="Give a Qwen2-VL model.")
    raw = _without_layers(model.config.raw)
    bare = replace(model, config=replace(model.config, raw=raw))
    return load_module(bare, dtype=dtype)


def _without_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    changed = {name: value for name, value in raw.items() if name != "layer_types"}
    if isinstance(raw.get("text_config"), Mapping):
        changed["text_config"] = _without_layers(raw["text_config"])
    return {**changed, "num_hidden_layers": 0}


@torch.inference_mode()
def prefill_embeddings(module: nn.Module, sample: Sample) -> Tensor:
    """inputs_embeds float32 [1, tokens, hidden] of the language model's first call, captured
    where the model makes it: image tokens are merged in."""
    backbone: Any = module.model
    captured: list[Tensor] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(kwargs["inputs_embeds"])

    hook = backbone.language_model.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        backbone(**model_inputs(module, sample))
    finally:
        hook.remove()
    return captured[0].float()


def vision_image(model: Model, sample: Sample, dtype: torch.dtype) -> Tensor:
    """The compiler's image float32 [height, width, planes] of a sample's one still image, its
    values rounded to `dtype`."""
    vision = model.config.vision
    if vision is None or sample.pixel_values is None or sample.image_grid_thw is None:
        raise ModelError(f"{sample.origin} has no image", file=model.config.file)
    grid = patch_grid(sample.image_grid_thw[0], vision)
    return merged_image(sample.pixel_values.to(dtype).float(), grid)[0]
