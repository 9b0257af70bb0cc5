"""The recipe's data: pictures with questions and answers, and text, for calibration and report.

A folder of pictures comes with prompts.yaml (file name -> prompts) and answers.json (file name
-> answers, parallel to the prompts).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from training.language import write_text
from training.questions import KINDS, Question, ask
from training.shapes import Pixels, Scene, render, sample_scene

TRAINING_SEED = 1000
CALIBRATION_SEED = 2000
EVALUATION_SEED = 3000
CALIBRATION_PICTURES, EVALUATION_PICTURES, QUESTIONS = 48, 200, 5
# Characters; a token is about five. At least 64 x 512 tokens, and at least 24 x 512.
CALIBRATION_TEXT, EVALUATION_TEXT = 190_000, 80_000


@dataclass(frozen=True)
class Picture:
    """A picture, its file name, what it shows and its questions."""

    name: str
    scene: Scene
    pixels: Pixels
    questions: list[Question]


def draw_pictures(seed: int, count: int) -> list[Picture]:
    """Pictures with QUESTIONS questions each, of different kinds; a pure function of the seed."""
    rng = np.random.default_rng(seed)
    pictures = []
    for index in range(count):
        scene = sample_scene(rng)
        pixels = render(scene, rng)
        kinds = [str(kind) for kind in rng.permutation(KINDS)[:QUESTIONS]]
        pictures.append(Picture(f"{index:04d}.png", scene, pixels, ask(scene, kinds, rng)))
    return pictures


def _write_pictures(folder: Path, pictures: list[Picture]) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(picture.pixels).save(folder / "images" / picture.name, optimize=True)
    prompts = {p.name: [q.prompt for q in p.questions] for p in pictures}
    answers = {p.name: [q.answer for q in p.questions] for p in pictures}
    (folder / "prompts.yaml").write_text(yaml.safe_dump(prompts, sort_keys=True), encoding="utf-8")
    text = json.dumps(answers, indent=1, sort_keys=True) + "\n"
    (folder / "answers.json").write_text(text, encoding="utf-8")


def write_assets(folder: Path) -> None:
    """Write calibration/, evaluation/, calibration.txt and evaluation.txt below `folder`."""
    _write_pictures(folder / "calibration", draw_pictures(CALIBRATION_SEED, CALIBRATION_PICTURES))
    _write_pictures(folder / "evaluation", draw_pictures(EVALUATION_SEED, EVALUATION_PICTURES))
    for name, seed, length in (
        ("calibration.txt", CALIBRATION_SEED, CALIBRATION_TEXT),
        ("evaluation.txt", EVALUATION_SEED, EVALUATION_TEXT),
    ):
        (folder / name).write_text(write_text(seed, length), encoding="utf-8")
