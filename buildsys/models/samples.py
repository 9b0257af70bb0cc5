"""Samples for profiling and evaluation: windows of text, and images with prompt and answer."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from buildsys.models.errors import ModelError
from buildsys.models.text import load_tokenizer, token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from buildsys.models.open import Model

WINDOW = 512
# Characters tokenized per token wanted at first: English has about four.
_CHARACTERS = 8
# Tokens this near to where a text was cut may differ from those of the whole text.
_MARGIN = 256


@dataclass(frozen=True)
class Sample:
    """One forward pass: batch 1, no padding.

    input_ids: int64 [1, n]. pixel_values [patches, features] and image_grid_thw [images, 3]
        for a sample with images. answer: which positions of input_ids are the given answer and
        the end of its turn (None where there is none). origin: where it is from, for messages.
    """

    input_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    answer: slice | None = None
    origin: str = ""


@dataclass(frozen=True)
class Length:
    """How long a sample is: tokens of the language model, patches of the vision tower."""

    tokens: int
    patches: int = 0


class Samples(Protocol):
    """A known number of samples, made one by one as they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def lengths(self) -> list[Length]:
        """The length of every sample, in order, without making them."""


@dataclass(frozen=True)
class TextSamples:
    """Windows of text, which are small enough to be held all at once."""

    windows: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.windows)

    def lengths(self) -> list[Length]:
        return [Length(sample.input_ids.shape[1]) for sample in self.windows]


def open_samples(
    model: Model, kind: str, paths: Mapping[str, Path], options: Mapping[str, Any]
) -> Samples:
    """The samples of a `text` or an `images` source with its options, for this model.

    Raises ModelError naming the file, image or line that is wrong.
    """
    if kind == "text":
        return text_samples(
            model,
            paths["path"],
            samples=options.get("samples"),
            tokens=options.get("tokens") or WINDOW,
            field=options.get("field") or "text",
            seed=options.get("seed"),
        )
    from buildsys.models.image_samples import image_samples

    return image_samples(
        model,
        paths["path"],
        prompts=paths.get("prompts"),
        answers=paths.get("answers"),
        samples=options.get("samples"),
        size=options.get("size"),
        seed=options.get("seed"),
    )


def text_samples(
    model: Model,
    path: Path,
    *,
    samples: int | None = None,
    tokens: int = WINDOW,
    field: str = "text",
    seed: int | None = None,
) -> TextSamples:
    """Non-overlapping windows of at most `tokens` tokens, without BOS.

    A plain text is cut into whole windows. Of .jsonl and .jsonl.zst every line is a text of its
    own (`field`): first the first window of each is taken, then the second ones, and a shorter
    last window counts. seed: the order is random; without it it is that of the file.
    Raises ModelError where there are fewer windows than `samples`.
    """
    tokenizer = load_tokenizer(model.folder)
    if path.name.endswith((".jsonl", ".jsonl.zst")):
        texts = list(read_json_lines(path, field))
        if seed is not None:
            random.Random(seed).shuffle(texts)
        windows = _take(_in_turns(_windows_of_lines(tokenizer, texts, tokens)), samples)
    else:
        text = read_text(path)
        wanted = None if samples is None or seed is not None else samples * tokens
        windows = _whole_windows(_first_tokens(tokenizer, text, wanted), tokens)
        if seed is not None:
            random.Random(seed).shuffle(windows)
        windows = _take(windows, samples)
    if not windows or len(windows) < (samples or 0):
        raise ModelError(
            f"gives {len(windows)} windows of {tokens} tokens, not {samples or 1}",
            file=path,
            remedy="Give a longer text, or fewer samples or tokens.",
        )
    return TextSamples(
        tuple(
            Sample(torch.tensor([ids]), origin=f"{path.name}, window {index}")
            for index, ids in enumerate(windows)
        )
    )


def read_text(path: Path) -> str:
    """A UTF-8 text. Raises ModelError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"is not UTF-8 (byte {error.start})", file=path) from error


def read_json_lines(path: Path, field: str) -> Iterator[str]:
    """The text in `field` of every line of a .jsonl or .jsonl.zst file. Raises ModelError."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ModelError(f"line {number} is not JSON ({error})", file=path) from error
        text = content.get(field) if isinstance(content, dict) else None
        if not isinstance(text, str):
            remedy = "The option `field` says which field of a line holds the text."
            message = f"line {number} has no text in this field"
            raise ModelError(message, file=path, field=field, remedy=remedy)
        yield text


def _lines(path: Path) -> Iterator[str]:
    import zstandard

    try:
        with path.open("rb") as stream:
            if path.suffix == ".zst":
                raw = zstandard.ZstdDecompressor().stream_reader(stream)
                yield from io.TextIOWrapper(raw, encoding="utf-8")
            else:
                yield from io.TextIOWrapper(stream, encoding="utf-8")
    except (OSError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise ModelError(f"cannot be read: {error}", file=path) from error


def _first_tokens(tokenizer: Tokenizer, text: str, count: int | None) -> list[int]:
    """The first `count` tokens of the text (all for None), without tokenizing all of it."""
    length = len(text) if count is None else count * _CHARACTERS
    while length < len(text):
        assert count is not None
        ids = token_ids(tokenizer, text[:length])
        if len(ids) >= count + _MARGIN:
            return ids[:count]
        length *= 2
    return token_ids(tokenizer, text)


def _whole_windows(ids: list[int], tokens: int) -> list[list[int]]:
    return [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]


def _windows_of_lines(
    tokenizer: Tokenizer, texts: Iterable[str], tokens: int
) -> Iterator[list[list[int]]]:
    """The windows of each text; one token alone predicts nothing and is left out."""
    for text in texts:
        ids = token_ids(tokenizer, text)
        windows = [ids[start : start + tokens] for start in range(0, len(ids), tokens)]
        yield [window for window in windows if len(window) > 1]


def _in_turns(groups: Iterator[list[list[int]]]) -> Iterator[list[int]]:
    """The first of every group, as they come, then the second of every group, ..."""
    seen: list[list[list[int]]] = []
    for group in groups:
        seen.append(group)
        yield from group[:1]
    for place in range(1, max(map(len, seen), default=0)):
        yield from (group[place] for group in seen if place < len(group))


def _take(windows: Iterable[list[int]], samples: int | None) -> list[list[int]]:
    return list(itertools.islice(windows, samples))
