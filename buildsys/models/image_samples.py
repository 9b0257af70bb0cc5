"""Images with prompts and given answers, as a vision-language model reads them.

prompts: a YAML or JSON file, either a list of prompts for every image, or a mapping from an
image's file name to its prompt or list of prompts. answers: a mapping from an image's file name
to the answers, parallel to its prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from buildsys.models.errors import ModelError
from buildsys.models.samples import Length, Sample, read_text
from buildsys.models.text import ChatTemplate, load_tokenizer, token_ids

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

    from buildsys.models.open import Model

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# What is asked where the recipe gives no prompts.
DEFAULT_PROMPT = "Describe this image."


@dataclass(frozen=True)
class Question:
    """One prompt about one image file, with its given answer where there is one."""

    image: Path
    prompt: str
    answer: str | None


@dataclass(frozen=True)
class ImageSamples:
    """Every question as a `Sample`; pixels are read as they are asked for.

    size: (height, width) to which every image is resized; None for the processor's own rule.
    """

    questions: tuple[Question, ...]
    size: tuple[int, int] | None
    image_token: int
    tokenizer: Tokenizer
    template: ChatTemplate
    processor: Any

    def __len__(self) -> int:
        return len(self.questions)

    def sample(self, question: Question) -> Sample:
        """One question alone. Raises ModelError for an image that cannot be read."""
        return self._sample(question, *self._pixels(question.image))

    def __iter__(self) -> Iterator[Sample]:
        held: tuple[Path, torch.Tensor, torch.Tensor] | None = None
        for question in self.questions:
            if held is None or held[0] != question.image:
                held = (question.image, *self._pixels(question.image))
            yield self._sample(question, held[1], held[2])

    def lengths(self) -> list[Length]:
        patches: dict[Path, int] = {}
        found = []
        for question in self.questions:
            if question.image not in patches:
                patches[question.image] = self._patches(question.image)
            count = patches[question.image]
            ids, answer = self._tokens(question, count)
            found.append(Length(len(ids) + len(answer), count))
        return found

    def _sample(self, question: Question, pixels: torch.Tensor, grid: torch.Tensor) -> Sample:
        ids, answer = self._tokens(question, len(pixels))
        return Sample(
            input_ids=torch.tensor([ids + answer]),
            pixel_values=pixels,
            image_grid_thw=grid,
            answer=slice(len(ids), len(ids) + len(answer)) if answer else None,
            origin=f"{question.image.name}: {question.prompt}",
        )

    def _tokens(self, question: Question, patches: int) -> tuple[list[int], list[int]]:
        """The prompt's tokens, the image's own included, and those of the given answer."""
        if question.answer is None:
            prompt, ending = self.template.prompt(question.prompt, images=1), ""
        else:
            prompt, ending = self.template.answered(question.prompt, question.answer, images=1)
        ids = token_ids(self.tokenizer, prompt)
        answer = token_ids(self.tokenizer, ending) if ending else []
        return self._with_image_tokens(ids, patches), answer

    def _with_image_tokens(self, ids: list[int], patches: int) -> list[int]:
        """The template's one image token, once for every merged token of the image."""
        if ids.count(self.image_token) != 1:
            raise ModelError(
                f"the chat template wrote {ids.count(self.image_token)} image tokens for one image",
                field="image_token_id",
                remedy="Chat template, tokenizer and config.json must be of one model.",
            )
        at, merged = ids.index(self.image_token), patches // int(self.processor.merge_size) ** 2
        return [*ids[:at], *[self.image_token] * merged, *ids[at + 1 :]]

    def _patches(self, file: Path) -> int:
        """How many patches an image will have; only its header is read."""
        with _open_image(file) as image:
            width, height = image.size
        if self.size is not None:
            height, width = self.size
            return height * width // int(self.processor.patch_size) ** 2
        return int(self.processor.get_number_of_image_patches(height, width))

    def _pixels(self, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """pixel_values float32 [patches, features] and grid int64 [1, 3] of one image file."""
        image = _read_image(file)
        if self.size is not None:
            # PIL counts (width, height).
            image = image.resize(self.size[::-1], resample=3)
        made = self.processor.preprocess([image], do_resize=self.size is None, return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]


def image_samples(
    model: Model,
    folder: Path,
    *,
    prompts: Path | None = None,
    answers: Path | None = None,
    samples: int | None = None,
    size: Sequence[int] | None = None,
    seed: int | None = None,
) -> ImageSamples:
    """The questions about the images of a folder, images in order of their names.

    samples: how many images; seed: choose them at random. size: (height, width) in pixels.
    Raises ModelError naming the file: no image, a missing prompt or answer, too few images.
    """
    if model.config.vision is None or model.config.image_token_id is None:
        message = f"a {model.config.model_type} sees no images"
        raise ModelError(message, file=model.config.file, remedy="Give text samples.")
    tokenizer = load_tokenizer(model.folder)
    processor = load_processor(model.folder)
    return ImageSamples(
        questions=tuple(_questions(_choose(folder, samples, seed), folder, prompts, answers)),
        size=_checked_size(size, processor.patch_size * processor.merge_size),
        image_token=model.config.image_token_id,
        tokenizer=tokenizer,
        template=ChatTemplate(model.folder, tokenizer),
        processor=processor,
    )


def _choose(folder: Path, samples: int | None, seed: int | None) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files or len(files) < (samples or 0):
        message = f"holds {len(files)} images, not {samples or 1}"
        raise ModelError(message, file=folder, remedy="Give more images, or fewer samples.")
    if seed is not None:
        random.Random(seed).shuffle(files)
    return files[:samples]


def _questions(
    images: Sequence[Path], folder: Path, prompts: Path | None, answers: Path | None
) -> Iterator[Question]:
    asked = [DEFAULT_PROMPT] if prompts is None else _read_table(prompts)
    given = {} if answers is None else _read_table(answers)
    for image in images:
        name = image.relative_to(folder).as_posix()
        its_prompts = _texts_of(asked, name, prompts, "prompt")
        its_answers: list[str] | list[None] = [None] * len(its_prompts)
        if answers is not None:
            its_answers = _texts_of(given, name, answers, "answer")
        if len(its_answers) != len(its_prompts):
            message = f"{len(its_answers)} answers for {len(its_prompts)} prompts"
            raise ModelError(message, file=answers, field=name)
        for prompt, answer in zip(its_prompts, its_answers, strict=True):
            yield Question(image, prompt, answer)


def _texts_of(table: object, image: str, file: Path | None, what: str) -> list[str]:
    """The texts that `table` has for an image: a list is for every image."""
    texts = table.get(image) if isinstance(table, Mapping) else table
    texts = [texts] if isinstance(texts, str) else texts
    if texts is None:
        message = f"there is no {what} for this image"
        raise ModelError(message, file=file, field=image, remedy=f"Add one {what} per question.")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        message = f"{what}s must be a text or a list of texts"
        raise ModelError(message, file=file, field=image)
    return texts


def _read_table(file: Path) -> object:
    import yaml

    content = read_text(file)
    try:
        return json.loads(content) if file.suffix == ".json" else yaml.safe_load(content)
    except (ValueError, yaml.YAMLError) as error:
        raise ModelError(f"cannot be read ({error})", file=file) from error


def _open_image(file: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise _unreadable(file, error) from error


def _read_image(file: Path) -> Image:
    with _open_image(file) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ModelError:
    """What Pillow raises for a damaged image depends on its format."""
    message = f"is no image that can be read ({error})"
    return ModelError(message, file=file, remedy="Remove it, or replace it.")


def load_processor(folder: Path) -> Any:
    """Qwen2-VL's image processor, the variant that needs no torchvision."""
    from transformers import Qwen2VLImageProcessorPil

    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        remedy = "Images need the model's preprocessor_config.json."
        raise ModelError("holds no image processor", file=folder, remedy=remedy)
    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def _checked_size(size: Sequence[int] | None, unit: int) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size
    if height % unit or width % unit:
        message = f"{[height, width]} is not a multiple of {unit} pixels (patch x merge)"
        raise ModelError(message, field="size", remedy="Give a height and width that are.")
    return height, width
