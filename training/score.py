"""Scores a model folder on a folder of pictures, as a user would run it.

    python -m training.score MODEL_FOLDER DATA_FOLDER [--text FILE]

transformers' own image processor, tokenizer, chat template and model, in float32, one question
at a time. transformers 5 builds Qwen2VLProcessor only where torchvision is (its video part
needs it), so its two halves are used side by side; they do what it does.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

PERPLEXITY_WINDOW = 512


@dataclass(frozen=True)
class Sample:
    """Model inputs of a prompt with its answer; the answer is the last `answer` tokens."""

    inputs: dict[str, torch.Tensor]
    answer: int
    prompt: str


@dataclass(frozen=True)
class Score:
    """Figures over questions.

    exact_match: share of questions whose greedy answer is the answer. log_probability: mean
    over questions of the answer's log-probability (end token included). margin: mean over
    questions of the least margin of a right token's logit over the best wrong one.
    """

    questions: int
    exact_match: float
    log_probability: float
    margin: float


class Reader:
    """Turns pictures, prompts and answers into model inputs, from a model folder's own files."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.images: Any = AutoImageProcessor.from_pretrained(folder)
        self.image_token: int = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def pixels(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """pixel_values and image_grid_thw of a picture."""
        return dict(self.images(images=image, return_tensors="pt"))

    def sample(self, pixels: dict[str, torch.Tensor], prompt: str, answer: str) -> Sample:
        """A chat with one picture and one prompt, and its answer up to <|im_end|>."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        count = int(pixels["image_grid_thw"].prod()) // self.images.merge_size**2
        chat = chat.replace("<|image_pad|>", "<|image_pad|>" * count)
        ends = self.tokenizer(answer + "<|im_end|>")["input_ids"]
        ids = torch.tensor([self.tokenizer(chat)["input_ids"] + ends])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == self.image_token).int(), **pixels}
        return Sample(inputs, len(ends), prompt)


def read_samples(model_folder: Path, data: Path) -> Iterator[Sample]:
    """Every question of a data folder (images/, prompts.yaml, answers.json), by file name."""
    reader = Reader(model_folder)
    prompts = yaml.safe_load((data / "prompts.yaml").read_text(encoding="utf-8"))
    answers = json.loads((data / "answers.json").read_text(encoding="utf-8"))
    for name in sorted(answers):
        with Image.open(data / "images" / name) as image:
            pixels = reader.pixels(image)
        for prompt, answer in zip(prompts[name], answers[name], strict=True):
            yield reader.sample(pixels, prompt, answer)


def score(model: Qwen2VLForConditionalGeneration, samples: list[Sample]) -> Score:
    """Score answers with the given answer as context: for exact match that is greedy decoding.

    A greedy decoder leaves the answer exactly where the first wrong argmax stands.
    """
    right, log_probability, margin = 0, 0.0, 0.0
    for sample in samples:
        with torch.inference_mode():
            logits = model(
                **sample.inputs, use_cache=False, logits_to_keep=sample.answer + 1
            ).logits
        logits = logits[0, :-1].double()
        wanted = sample.inputs["input_ids"][0, -sample.answer :, None]
        chosen = logits.gather(1, wanted)
        best_other = logits.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
        least = (chosen - best_other).min().item()
        right += least > 0
        margin += least
        log_probability += logits.log_softmax(1).gather(1, wanted).sum().item()
    count = len(samples)
    return Score(count, right / count, log_probability / count, margin / count)


def perplexity(
    model: Qwen2VLForConditionalGeneration, tokens: list[int], windows: int | None = None
) -> float:
    """Perplexity over windows of PERPLEXITY_WINDOW tokens, none across a border, no BOS."""
    usable = len(tokens) // PERPLEXITY_WINDOW * PERPLEXITY_WINDOW
    rows = torch.tensor(tokens[:usable]).view(-1, PERPLEXITY_WINDOW)[:windows]
    total = 0.0
    for row in rows:
        with torch.inference_mode():
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total += cross_entropy(logits.double(), row[1:], reduction="sum").item()
    return float(torch.tensor(total / (len(rows) * (PERPLEXITY_WINDOW - 1))).exp())


def load_model(folder: Path) -> Qwen2VLForConditionalGeneration:
    """The model of a folder in float32."""
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    """Print the figures of a model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--text", type=Path, help="also measure perplexity on this text")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    print(score(model, list(read_samples(arguments.model, arguments.data))))
    if arguments.text:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        tokens = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]
        print(f"perplexity {perplexity(model, tokens):.3f} on {len(tokens)} tokens")


if __name__ == "__main__":
    main()
