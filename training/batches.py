"""Training batches: one picture, many questions.

A picture and its prompt prefix are computed once and shared by all questions about it: each
question attends to the prefix and to itself only, and its positions start where the prefix
ends. So a row of the batch is worth as many samples as it has questions, and each of them sees
exactly what it would see alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.architecture import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH
from training.language import write_text
from training.questions import Question, ask
from training.shapes import (
    COLORS,
    GRID,
    SHAPES,
    SIDE,
    SIZES,
    Pixels,
    Scene,
    render,
    sample_scene,
)
from training.tokenizer import SYSTEM, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE = -100
SIDE_PATCHES = SIDE // PATCH
IMAGE_TOKENS = (SIDE_PATCHES // MERGE) ** 2
CELL_CLASSES = (len(COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1, GRID * GRID)


@dataclass(frozen=True)
class Batch:
    """Rows of pictures with their questions, or of plain text (then without patches).

    patches [B, P, C*PATCH*PATCH] float32; tokens, labels [B, L]; positions [3, B, L];
    mask [B, 1, L, L] bool, true where a query may look; cells [B, IMAGE_TOKENS, 4], what each
    image token looks at (`cell_labels`); weights [N], one per label, in the order of the rows.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    patches: torch.Tensor | None
    cells: torch.Tensor | None


def to_patches(images: list[Pixels]) -> torch.Tensor:
    """Normalize and cut as Qwen2-VL's processor does, one of the two equal frames.

    Returns float32 [B, patches, C*PATCH*PATCH]; the four patches of a merged token follow
    each other.
    """
    pixels = torch.from_numpy(np.stack(images)).float() / 255.0
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    grid = SIDE_PATCHES // MERGE
    cut = pixels.view(len(images), grid, MERGE, PATCH, grid, MERGE, PATCH, 3)
    return cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(images), SIDE_PATCHES**2, -1)


def cell_labels(scenes: list[Scene]) -> torch.Tensor:
    """Colour, kind, size (0: nothing there) and place of each image token's cell.

    int64 [B, IMAGE_TOKENS, 4], in the ranges of CELL_CLASSES.
    """
    colors = list(COLORS)
    rows = [
        [
            (0, 0, 0, place)
            if cell is None
            else (
                1 + colors.index(cell.color),
                1 + SHAPES.index(cell.shape),
                1 + SIZES.index(cell.size),
                place,
            )
            for place, cell in enumerate(scene.cells)
        ]
        for scene in scenes
    ]
    each = SIDE_PATCHES // MERGE // GRID
    grid = torch.tensor(rows).view(len(scenes), GRID, GRID, len(CELL_CLASSES))
    return grid.repeat_interleave(each, 1).repeat_interleave(each, 2).flatten(1, 2)


class Sampler:
    """Draws batches; its generator and its place in the text are the state."""

    def __init__(self, tokenizer: "Tokenizer", seed: int, text_characters: int) -> None:
        self.tokenizer = tokenizer
        self.rng = np.random.default_rng(seed)
        self.text = np.array(tokenizer.encode(write_text(seed, text_characters)).ids)
        self.image_token = special_id(tokenizer, "<|image_pad|>")
        self.prefix = tokenizer.encode(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * IMAGE_TOKENS
            + "<|vision_end|>"
        ).ids
        self.prefix_positions = self._prefix_positions()

    def _prefix_positions(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """mrope positions of the prefix, int64 [3, P]: text, the 2-D grid, text again."""
        first, side = self.prefix.index(self.image_token), SIDE_PATCHES // MERGE
        positions = np.tile(np.arange(len(self.prefix)), (3, 1))
        rows, columns = np.divmod(np.arange(IMAGE_TOKENS), side)
        after = first + IMAGE_TOKENS
        positions[:, first:after] = first + np.stack([np.zeros_like(rows), rows, columns])
        positions[:, after:] -= IMAGE_TOKENS - side
        return positions

    def texts(self, rows: int, length: int) -> Batch:
        """Windows of plain text; every token is a label."""
        starts = self.rng.integers(0, len(self.text) - length, size=rows)
        tokens = torch.from_numpy(np.stack([self.text[s : s + length] for s in starts]))
        positions = torch.arange(length).expand(3, rows, length)
        weights = torch.ones(rows * (length - 1))
        mask = _mask(torch.zeros_like(tokens))
        return Batch(tokens, tokens, positions, mask, weights, None, None)

    def pictures(self, rows: int, kinds: Sequence[str]) -> Batch:
        """Fresh pictures, each with its questions; the answers are the labels."""
        scenes = [sample_scene(self.rng) for _ in range(rows)]
        images = [render(scene, self.rng) for scene in scenes]
        return self.pack(scenes, images, [ask(scene, kinds, self.rng) for scene in scenes])

    def pack(self, scenes: list[Scene], images: list[Pixels], asked: list[list[Question]]) -> Batch:
        """Lay out pictures and questions as described at the top of the module."""
        flat = [question for row in asked for question in row]
        encode = self.tokenizer.encode_batch_fast
        prompts = encode([f"{q.prompt}<|im_end|>\n<|im_start|>assistant\n" for q in flat])
        answers = encode([f"{q.answer}<|im_end|>" for q in flat])
        pairs = iter([(p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)])
        rows = [[next(pairs) for _ in row] for row in asked]
        # A long answer weighs more than a short one, but not by its length.
        weights = [len(a) ** -0.5 for row in rows for _, a in row for _ in a]
        length = len(self.prefix) + max(sum(len(p) + len(a) for p, a in row) for row in rows)
        shape = (len(rows), length)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        segments, positions = np.full(shape, -1, np.int64), np.zeros((3, *shape), np.int64)
        begin = int(self.prefix_positions[0, -1]) + 1
        for b, row in enumerate(rows):
            at = len(self.prefix)
            tokens[b, :at], segments[b, :at] = self.prefix, 0
            positions[:, b, :at] = self.prefix_positions
            for index, (prompt, answer) in enumerate(row, start=1):
                end = at + len(prompt) + len(answer)
                tokens[b, at:end] = prompt + answer
                labels[b, at + len(prompt) : end] = answer
                segments[b, at:end] = index
                positions[:, b, at:end] = np.arange(begin, begin + end - at)
                at = end
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            _mask(torch.from_numpy(segments)),
            torch.tensor(weights),
            to_patches(images),
            cell_labels(scenes),
        )


def _mask(segments: torch.Tensor) -> torch.Tensor:
    """Causal, and within the prefix (0) or the own segment. bool [B, 1, L, L]."""
    query, key = segments[:, :, None], segments[:, None, :]
    return (((key == 0) | (key == query)).tril())[:, None]
