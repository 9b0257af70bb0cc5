"""What a runner must know to turn a prompt and an image into a graph's inputs, for io.json.

The chat template is rendered here, around a mark, so that a device needs no Jinja; the tokenizer
travels beside the contexts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.models.errors import ModelError
from buildsys.models.graph.language import layer_sizes
from buildsys.models.text import ChatTemplate, load_tokenizer, token_ids

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.qnn.pieces import Cut

TOKENIZER = "tokenizer.json"
# A character for private use: no template has it, and no person types it.
MARK = "\ue000"


def dialogue(cut: Cut, *, vision: bool) -> dict[str, Json]:
    """Prompts with MARK in the place of the text, ends of a turn, the CPU's share of the model,
    and the image processor's numbers."""
    content: dict[str, Json] = {"prompt": _prompts(cut, vision), "decode": _decode(cut)}
    if vision:
        content["image"] = _image(cut)
    return content


def _prompts(cut: Cut, vision: bool) -> dict[str, Json]:
    tokenizer = load_tokenizer(cut.model.folder)
    told = cut.model.config.raw.get("eos_token_id")
    ends = {each for each in (told if isinstance(told, list) else [told]) if isinstance(each, int)}
    prompts: dict[str, Json] = {"mark": MARK, "text": MARK, "ends": sorted(ends)}
    try:
        template = ChatTemplate(cut.model.folder, tokenizer)
    except ModelError:
        return prompts  # a model without a template goes on from the bare text
    prompts["text"] = template.prompt(MARK)
    if vision:
        prompts["with_image"] = template.prompt(MARK, images=1)
        prompts["image_token"] = cut.model.config.image_token_id
    _, answer = template.answered(MARK, MARK)
    ends.update(token_ids(tokenizer, answer.replace(MARK, ""))[:1])
    return {**prompts, "ends": sorted(ends)}


def _decode(cut: Cut) -> dict[str, Json]:
    config, sizes = cut.model.config, layer_sizes(cut.model.config)
    return {
        "layers": config.num_hidden_layers,
        "heads": sizes.heads,
        "epsilon": sizes.epsilon,
    }


def _image(cut: Cut) -> dict[str, Json]:
    from buildsys.models.image_samples import load_processor

    processor = load_processor(cut.model.folder)
    return {
        "mean": [float(x) for x in processor.image_mean],
        "std": [float(x) for x in processor.image_std],
        "min_pixels": int(processor.size["shortest_edge"]),
        "max_pixels": int(processor.size["longest_edge"]),
    }
