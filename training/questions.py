"""Questions about a scene, with their answers: six kinds, one exact answer each.

All of them ask what is where. Counting and searching were tried too: a model of this size does
not learn them to 99 % in the minutes that its training may take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.shapes import GRID, POSITIONS, Scene, Shape, sample_scene

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


def _attribute(scene: Scene, rng: np.random.Generator, attribute: str, noun: str) -> Question:
    index = int(rng.integers(GRID * GRID))
    cell = scene.cells[index]
    answer = "nothing" if cell is None else str(getattr(cell, attribute))
    return Question(attribute, f"What {noun} is at the {POSITIONS[index]}?", answer)


def _color(scene: Scene, rng: np.random.Generator) -> Question:
    return _attribute(scene, rng, "color", "color")


def _kind(scene: Scene, rng: np.random.Generator) -> Question:
    return _attribute(scene, rng, "shape", "shape")


def _size(scene: Scene, rng: np.random.Generator) -> Question:
    return _attribute(scene, rng, "size", "size")


def _picture(scene: Scene, _rng: np.random.Generator) -> Question:
    answer = "; ".join(
        ", ".join(_name(cell) for cell in scene.cells[row * GRID : (row + 1) * GRID])
        for row in range(GRID)
    )
    return Question("picture", "Describe the picture.", answer)


_KINDS: dict[str, Callable[[Scene, np.random.Generator], Question]] = {
    "at": _at,
    "color": _color,
    "shape": _kind,
    "size": _size,
    "line": _line,
    "picture": _picture,
}
KINDS = tuple(_KINDS)


def ask(scene: Scene, kinds: Sequence[str], rng: np.random.Generator) -> list[Question]:
    """Ask different questions, one of each kind named; any other where a kind does not fit."""
    asked: dict[str, Question] = {}
    for wanted in kinds:
        count = len(asked)
        kind = wanted
        while len(asked) == count:
            question = _KINDS[kind](scene, rng)
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
