"""The vendor's classes for Qwen2-VL, as far as their callers can tell."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from standin.recording import need, need_type
from transformers import Qwen2VLForConditionalGeneration


def repreprocess_pixel_values(pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """[frame groups, 6, height, 56] from rows of patches, by index arithmetic."""
    need(tuple(grid.shape) == (3,), "the grid of one image")
    frames, rows, columns = (int(n) for n in grid)
    out = torch.empty(frames, 6, rows * columns // 4 * 14, 56)
    patches = pixel_values.float().reshape(frames, -1, 4, 3, 2, 14, 14)
    for block in range(patches.shape[1]):
        for inside in range(4):
            for plane in range(6):
                window = patches[:, block, inside, plane % 3, plane // 3]
                top, left = block * 14, inside * 14
                out[:, plane, top : top + 14, left : left + 14] = window
    return out


class Rope(torch.nn.Module):
    """Stands for both names of the cached rotary embedding."""

    positions: Any = None

    def __init__(self, old: Any = None) -> None:
        super().__init__()
        self.old = old

    def set_rope(self, position_ids: torch.Tensor) -> None:
        need_type("position_ids", position_ids, torch.Tensor)
        need(position_ids.shape[0] == 3, "positions are of time, height and width")
        self.positions = position_ids


CachedQwen2VLTextRotaryEmbedding = Rope


class _Text:
    def __init__(self, text: Any) -> None:
        self.layers, self.rotary_emb = text.layers, Rope(text.rotary_emb)


class WrappedLanguage:
    output_meta: ClassVar = {"type": "dict", "keys": ["logits"]}

    def __init__(self, model: Any) -> None:
        need_type("model", model, Qwen2VLForConditionalGeneration)
        text = model.model.language_model
        self.model = self.text = _Text(text)
        self.hidden_size = text.config.hidden_size

    @property
    def layer_count(self) -> int:
        return len(self.model.layers)


LanguageModelForQwen2VL = WrappedLanguage


class VisionModelForQwen2VL:
    layer_count = 0

    def __init__(self, model: Any) -> None:
        need_type("model", model, Qwen2VLForConditionalGeneration)
        self.hidden_size = model.config.text_config.hidden_size
        self.grid: torch.Tensor | None = None

    def set_grid_thw(self, grid: torch.Tensor) -> None:
        need_type("the grid", grid, torch.Tensor)
        need(grid.ndim == 2 and grid.shape[1] == 3, "grids are [images, 3]")
        self.grid = grid

    def to(self, device: Any) -> VisionModelForQwen2VL:
        need_type("device", device, (str, torch.device))
        return self


class Projection(torch.nn.Module):
    output_meta: ClassVar = {"type": "list", "keys": [0]}

    def __init__(self, language_model: Any, lm_head: Any) -> None:
        super().__init__()
        need_type("lm_head", lm_head, torch.nn.Linear)
        self.language_model, self.lm_head = language_model, lm_head
        self.hidden_size = lm_head.in_features

    @property
    def text(self) -> Any:
        return self.language_model

    @property
    def layer_count(self) -> int:
        return len(self.language_model.layers)

    def forward(self, *, cache_position: Any, **inputs: Any) -> torch.Tensor:
        hidden = self.language_model(**inputs).last_hidden_state
        return self.lm_head(hidden[:, -1:])


class Qwen2VLModel_get_image_feature:  # noqa: N801 (the vendor's name)
    def __init__(self, model: Any) -> None:
        need(hasattr(model, "visual"), "the model that holds the vision tower")


def Qwen2VL_get_image_features(self: Any, *given: Any, **named: Any) -> Any:  # noqa: N802
    need(hasattr(self, "get_image_feature_class"), "get_image_feature_class is set first")
    return type(self).get_image_features(self, *given, **named)


class _Wrapper(Qwen2VLForConditionalGeneration):
    """Answers through `projection`, once that is set."""

    @property
    def visual(self) -> Any:
        return self.model.visual

    @property
    def language_model(self) -> Any:
        return self.model.language_model

    def forward(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        mm_token_type_ids: Any = None,
        **inputs: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        captured: dict[str, Any] = {}

        def capture(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            captured.update(kwargs)

        hook = self.model.language_model.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            inputs.pop("logits_to_keep", None)
            image = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
            kinds = {"mm_token_type_ids": mm_token_type_ids, "use_cache": False}
            self.model(input_ids=input_ids, **image, **{**inputs, **kinds})
        finally:
            hook.remove()
        names = ("attention_mask", "position_ids", "inputs_embeds")
        feed = {name: captured[name] for name in names}
        feed["cache_position"] = torch.arange(feed["inputs_embeds"].shape[1])
        return CausalLMOutputWithPast(logits=self.projection(**feed))


# transformers 5 would not load the weights of a class that is not its own; the vendor has 4.57.
_Wrapper.__name__ = Qwen2VLForConditionalGeneration.__name__
_Wrapper.__module__ = Qwen2VLForConditionalGeneration.__module__
Qwen2VLForConditionalGenerationWrapper = _Wrapper
