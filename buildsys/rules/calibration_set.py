"""Rule `calibration-set`: what an NPU compiler calibrates one half of a Qwen2-VL with.

language: the embeddings that the language model's first call gets, the image merged in.
vision: the image in the compiler's order (the vendor's early scripts wrote it unpermuted).
Samples are made one by one; a killed step goes on after the last one that was finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.model_inputs import model_input
from buildsys.rules.spec import InputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from buildsys.models.image_samples import ImageSamples, Question
    from buildsys.models.open import Model
    from buildsys.plan.graph import Plan, Step

ARRAYS = {"language": "inputs_embeds", "vision": "images"}
Capture = Callable[["Question"], "Tensor"]


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """A size is given once: by the images' source or here."""
    for ref in step.inputs.get("images", ()):
        source = plan.sources.get(ref.name)
        if source is not None and source.options.get("size") and step.options["size"]:
            yield Problem(
                f"source '{ref.name}' and option 'size' both give a size",
                "Remove one of them.",
                option="size",
            )


RULE = Rule(
    name="calibration-set",
    doc="A folder of .npy samples that an NPU compiler calibrates with.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "images": InputSpec(
            "Images; without prompts of their own, 20 kinds of prompts are asked in turn.",
            kinds=("images", "artifact", "folder"),
        ),
    },
    options={
        "part": {
            "enum": ["language", "vision"],
            "description": "Which half of the model the samples are for.",
        },
        "samples": {
            "type": ["integer", "null"],
            "minimum": 1,
            "default": None,
            "description": "How many images; null: as many as the source gives.",
        },
        "size": {
            "type": ["array", "null"],
            "items": {"type": "integer", "minimum": 1},
            "minItems": 2,
            "maxItems": 2,
            "default": None,
            "description": "Height and width of every image; null: the source's, else the "
            "processor's own rule. A vision mxq with fixed shapes needs one size.",
        },
        "precision": {
            "enum": ["float32", "bfloat16"],
            "default": "float32",
            "description": "What the model computes in; the vendor's scripts before 1.1 ran it in "
            "bfloat16. Arrays are float32 either way.",
        },
        "allow_failures": {
            "type": "integer",
            "minimum": 0,
            "default": 0,
            "description": "How many images may be unreadable; each one is in the log, in "
            "metadata.json and in the artifact's metadata.",
        },
    },
    distributions=("torch", "transformers", "tokenizers", "pillow", "numpy"),
    worker="python",
    threads=2,
    folder=True,
    resumable=True,
    float_sums=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Write the samples. Raises ModelError or StepError naming the image that fails."""
    from buildsys.formats.npy_set import discard_unfinished, write_index
    from buildsys.models.open import open_model

    model = open_model(step.one("model").path)
    samples = _open(step, model)
    step.out.mkdir(exist_ok=True)
    work = step.out if step.kept is None else step.kept
    discard_unfinished(work)
    shapes, failed = _write_samples(step, model, samples, work)
    array = ARRAYS[step.options["part"]]
    write_index(work, array, list(shapes), _metadata(step, samples, shapes, failed))
    if work != step.out:
        work.rename(step.out)  # in place of the empty folder
    step.note("samples", len(shapes))
    if failed:
        step.note("failed", {samples.questions[i].image.name: why for i, why in failed.items()})
    if step.options["part"] == "vision" and len(set(shapes.values())) > 1:
        step.warn(
            f"images of {len(set(shapes.values()))} sizes: a vision mxq with fixed shapes takes "
            "one; give `size: [height, width]`"
        )


def _open(step: StepContext, model: Model) -> ImageSamples:
    """The questions: the source's own prompts, else one of the 20 kinds for each image."""
    from dataclasses import replace

    from buildsys.models.calibration import PROMPTS
    from buildsys.models.image_samples import image_samples

    given = step.one("images")
    source = given.options
    samples = image_samples(
        model,
        given.path,
        prompts=given.paths.get("prompts"),
        samples=step.options["samples"] or source.get("samples"),
        size=step.options["size"] or source.get("size"),
        seed=source.get("seed"),
    )
    if "prompts" in given.paths:
        return samples
    texts = list(PROMPTS.values())
    asked = [
        replace(question, prompt=texts[index % len(texts)])
        for index, question in enumerate(samples.questions)
    ]
    return replace(samples, questions=tuple(asked))


def _write_samples(
    step: StepContext, model: Model, samples: ImageSamples, work: Path
) -> tuple[dict[int, tuple[int, ...]], dict[int, str]]:
    """Shapes of the samples that are in `work` afterwards, and why others are not."""
    from buildsys.formats.npy_set import sample_shape, write_sample
    from buildsys.models.errors import ModelError

    part, allowed = step.options["part"], int(step.options["allow_failures"])
    capture = _capture(step, model, samples)
    shapes: dict[int, tuple[int, ...]] = {}
    failed: dict[int, str] = {}
    for index, question in enumerate(samples.questions):
        step.progress(index, len(samples), "samples")
        found = sample_shape(work, index, ARRAYS[part])
        if found is None:
            try:
                array = capture(question)
            except ModelError as error:
                if len(failed) >= allowed:
                    raise
                failed[index] = error.message
                step.warn(f"{question.image.name} is left out: it {error.message}")
                continue
            write_sample(work, index, ARRAYS[part], array)
            found = tuple(array.shape)
        shapes[index] = found
    step.progress(len(samples), len(samples), "samples")
    if not shapes:
        raise StepError(f"{step.name}: no image could be read")
    return shapes, failed


def _capture(step: StepContext, model: Model, samples: ImageSamples) -> Capture:
    """Question -> array. The weights are loaded with the first one that needs them."""
    from functools import cache

    import torch

    from buildsys.models.calibration import embedding_module, prefill_embeddings, vision_image

    dtype = getattr(torch, step.options["precision"])
    if step.options["part"] == "vision":
        return lambda question: vision_image(model, samples.sample(question), dtype)

    @cache
    def module() -> torch.nn.Module:
        return embedding_module(model, dtype)

    return lambda question: prefill_embeddings(module(), samples.sample(question))


def _metadata(
    step: StepContext,
    samples: ImageSamples,
    shapes: Mapping[int, tuple[int, ...]],
    failed: Mapping[int, str],
) -> dict[str, Any]:
    """What the vendor's scripts write, with image names in place of paths of one machine."""
    from buildsys.formats.npy_set import sample_folder
    from buildsys.models.calibration import PROMPTS

    kinds = {text: kind for kind, text in PROMPTS.items()}
    array = ARRAYS[step.options["part"]]
    listed = [
        {
            "index": index,
            "name": f"{kinds.get(samples.questions[index].prompt, 'prompt')}_{index:03d}",
            "prompt": samples.questions[index].prompt,
            "image_url": samples.questions[index].image.name,
            "directory": sample_folder(index),
            **_told(array, shape),
        }
        for index, shape in shapes.items()
    ]
    left_out = [
        {"index": index, "image_url": samples.questions[index].image.name, "error": why}
        for index, why in failed.items()
    ]
    return {
        "model_name": step.one("model").name,
        "target": step.options["part"],
        "image_size": list(samples.size) if samples.size else None,
        "precision": step.options["precision"],
        "num_samples": len(listed),
        "samples": listed,
        "failed": left_out,
    }


def _told(array: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The vendor's two spellings: "shape" for language, "shapes" by name for vision."""
    return {"shape": list(shape)} if array == "inputs_embeds" else {"shapes": {array: list(shape)}}
