"""Questions about a scene, with their answers: six kinds, one exact answer each."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.shapes import COLORS, GRID, POSITIONS, SHAPES, SIZES, Scene, Shape, sample_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
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


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


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
    """Ask for a colour, a kind or a size; mostly for one that is there.

    The answer names the places before the number, as a careful counter would.
    """
    attribute = ("color", "shape", "size")[rng.integers(3)]
    values = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES)}[attribute]
    cells = [None if cell is None else str(getattr(cell, attribute)) for cell in scene.cells]
    present = [value for value in cells if value is not None]
    pool = present if present and rng.random() < 0.85 else values
    value = pool[rng.integers(len(pool))]
    noun = _plural(value) if attribute == "shape" else f"{value} shapes"
    places = [place for place, cell in zip(POSITIONS, cells, strict=True) if cell == value]
    answer = f"{', '.join(places) or 'nowhere'}, so {NUMBERS[len(places)]}"
    return Question("count", f"How many {noun} are there?", answer)


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask for a shape that its colour and kind (or its colour alone) single out."""
    pairs = Counter((s.color, s.shape) for s in scene.shapes())
    colors = Counter(s.color for s in scene.shapes())
    found = []
    for index, shape in enumerate(scene.cells):
        if shape is None:
            continue
        if pairs[shape.color, shape.shape] == 1:
            found.append((index, f"{shape.color} {shape.shape}"))
        if colors[shape.color] == 1:
            found.append((index, f"{shape.color} shape"))
    if not found:
        return None
    index, phrase = found[rng.integers(len(found))]
    return Question("where", f"Where is the {phrase}?", POSITIONS[index])


def _larger(scene: Scene, rng: np.random.Generator) -> Question | None:
    filled = [i for i, cell in enumerate(scene.cells) if cell is not None]
    if len(filled) < 2:
        return None
    first, second = (int(i) for i in rng.permutation(filled)[:2])
    prompt = f"Which shape is larger, {POSITIONS[first]} or {POSITIONS[second]}?"
    sizes = [SIZES.index(_size(scene.cells[i])) for i in (first, second)]
    if sizes[0] == sizes[1]:
        return Question("larger", prompt, "both are equal")
    return Question("larger", prompt, POSITIONS[first if sizes[0] > sizes[1] else second])


def _size(cell: Shape | None) -> str:
    assert cell is not None
    return cell.size


def _exists(scene: Scene, rng: np.random.Generator) -> Question:
    """Yes or no, even odds; a no differs from a shape that is there in one attribute."""
    there = scene.shapes()
    if not there:
        there = [Shape("small", "red", "circle")]
    shape = there[rng.integers(len(there))]
    if rng.random() < 0.5:
        color = list(COLORS)[rng.integers(len(COLORS))]
        kind = SHAPES[rng.integers(len(SHAPES))]
        shape = (
            Shape(shape.size, color, shape.shape)
            if rng.random() < 0.5
            else Shape(shape.size, shape.color, kind)
        )
    pairs = {(s.color, s.shape) for s in scene.shapes()}
    answer = "yes" if (shape.color, shape.shape) in pairs else "no"
    return Question("exists", f"Is there a {shape.color} {shape.shape}?", answer)


_KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "at": _at,
    "line": _line,
    "count": _count,
    "where": _where,
    "larger": _larger,
    "exists": _exists,
}
KINDS = tuple(_KINDS)
# What is slow to learn is asked more often in training.
TRAINING_KINDS = (*KINDS, "where", "larger", "exists")


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
