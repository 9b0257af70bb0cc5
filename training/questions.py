"""Questions about a scene, with their answers: five kinds, one exact answer each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.shapes import COLORS, GRID, POSITIONS, SIZES, Scene, Shape, sample_scene

NUMBERS = ("zero", "one", "two", "three")
LINES = (
    ("top row", (0, 1, 2)),
    ("middle row", (3, 4, 5)),
    ("bottom row", (6, 7, 8)),
    ("left column", (0, 3, 6)),
    ("middle column", (1, 4, 7)),
    ("right column", (2, 5, 8)),
)


@dataclass(frozen=True)
class Question:
    """A prompt and the only answer that counts as right."""

    kind: str
    prompt: str
    answer: str


def _name(cell: Shape | None) -> str:
    return "nothing" if cell is None else str(cell)


def _at(scene: Scene, rng: np.random.Generator) -> Question:
    index = int(rng.integers(GRID * GRID))
    prompt = f"What is at the {POSITIONS[index]}?"
    return Question("at", prompt, _name(scene.cells[index]))


def _line(scene: Scene, rng: np.random.Generator) -> Question:
    name, cells = LINES[rng.integers(len(LINES))]
    answer = ", ".join(_name(scene.cells[i]) for i in cells)
    return Question("line", f"Describe the {name}.", answer)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for the shapes of a colour in a row or column; mostly for a colour that is there.

    The answer goes through the cells before it says the number, as a careful counter would.
    """
    name, cells = LINES[rng.integers(len(LINES))]
    seen = [cell.color if cell else None for cell in (scene.cells[i] for i in cells)]
    present = [color for color in seen if color]
    pool = present if present and rng.random() < 0.8 else list(COLORS)
    color = pool[rng.integers(len(pool))]
    listed = ", ".join(each or "nothing" for each in seen)
    prompt = f"How many {color} shapes are in the {name}?"
    return Question("count", prompt, f"{listed}, so {NUMBERS[seen.count(color)]}")


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask which cell of a row or column holds a colour that is there once.

    This answer, too, goes through the cells before it concludes.
    """
    found = []
    for name, cells in LINES:
        seen = [cell.color if cell else None for cell in (scene.cells[i] for i in cells)]
        found += [
            (name, seen, color, place)
            for place, color in zip(cells, seen, strict=True)
            if color is not None and seen.count(color) == 1
        ]
    if not found:
        return None
    name, seen, color, place = found[rng.integers(len(found))]
    listed = ", ".join(each or "nothing" for each in seen)
    prompt = f"Where is the {color} shape of the {name}?"
    return Question("where", prompt, f"{listed}, so {POSITIONS[place]}")


def _larger(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Compare two shapes; the answer names both sizes, then the place of the larger."""
    filled = [(i, cell.size) for i, cell in enumerate(scene.cells) if cell is not None]
    if len(filled) < 2:
        return None
    (first, size), (second, other) = (filled[i] for i in rng.permutation(len(filled))[:2])
    prompt = f"Which shape is larger, {POSITIONS[first]} or {POSITIONS[second]}?"
    difference = SIZES.index(size) - SIZES.index(other)
    verdict = "neither" if difference == 0 else POSITIONS[first if difference > 0 else second]
    return Question("larger", prompt, f"{size} and {other}, so {verdict}")


_KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "at": _at,
    "line": _line,
    "count": _count,
    "where": _where,
    "larger": _larger,
}
KINDS = tuple(_KINDS)
# Looking up a named place is what every kind builds on, so training asks more of it.
TRAINING_KINDS = (*KINDS, "at", "at", "line")


def ask(scene: Scene, kinds: Sequence[str], rng: np.random.Generator) -> list[Question]:
    """Ask different questions, one of each kind named; any other where a kind does not fit."""
    asked: dict[str, Question] = {}
    for wanted in kinds:
        count = len(asked)
        kind = wanted
        while len(asked) == count:
            question = _KINDS[kind](scene, rng)
            if question is not None:
                asked.setdefault(question.prompt, question)
            kind = KINDS[rng.integers(len(KINDS))]
    return list(asked.values())


def every_prompt() -> list[str]:
    """A sample of every word and phrase of prompts and answers, for the tokenizer."""
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for _ in range(400):
        for question in ask(sample_scene(rng), KINDS, rng):
            texts += [question.prompt, question.answer]
    return texts
