"""Questions about a scene, with their answers: five kinds, one exact answer each."""

from collections import Counter
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
    """Ask for a shape that its colour alone, or its kind alone, singles out."""
    colors = Counter(shape.color for shape in scene.shapes())
    kinds = Counter(shape.shape for shape in scene.shapes())
    found = []
    for index, shape in enumerate(scene.cells):
        if shape is not None and colors[shape.color] == 1:
            found.append((index, f"{shape.color} shape"))
        if shape is not None and kinds[shape.shape] == 1:
            found.append((index, shape.shape))
    if not found:
        return None
    index, phrase = found[rng.integers(len(found))]
    return Question("where", f"Where is the {phrase}?", POSITIONS[index])


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
# A mild curriculum: looking up a named place comes first, searching and comparing after it.
FIRST_KINDS = ("at", "at", "at", "at", "at", "line", "line", "larger")
TRAINING_KINDS = (*KINDS, "where", "where", "larger")


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
