"""The shipped model folder and its data keep what the model card says."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from training.assets import (
    CALIBRATION_SEED,
    EVALUATION_SEED,
    EVALUATION_TEXT,
    draw_pictures,
)
from training.language import write_text
from training.score import load_model, read_samples, score
from training.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

ASSETS = Path(__file__).parents[2] / "recipes" / "assets"
MODEL = ASSETS / "qwen2vl-tiny"


@pytest.mark.parametrize("name", ["qwen2vl-tiny", "qwen2vl-tiny-massive"])
def test_answers_held_out_questions(name: str) -> None:
    model = load_model(ASSETS / name)
    samples = list(islice(read_samples(MODEL, ASSETS / "evaluation"), 40))
    figures = score(model, samples)
    assert figures.exact_match >= 0.97
    assert figures.log_probability > -0.5


def test_tokenizer_has_no_holes_and_one_meaning() -> None:
    raw = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(MODEL)
    assert sorted(raw.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert raw.get_vocab() == auto.get_vocab()
    assert AutoConfig.from_pretrained(MODEL).text_config.vocab_size == VOCAB_SIZE
    special = [raw.token_to_id(token) for token in SPECIAL_TOKENS]
    assert special == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    text = (ASSETS / "evaluation.txt").read_text(encoding="utf-8")[:20_000]
    for sample in (text, "<|im_start|>user\nIt's 1234; \u00e9 e\u0301\n\n  \u4f60\u597d<|im_end|>"):
        ids = raw.encode(sample).ids
        assert auto(sample)["input_ids"] == ids
        assert auto.decode(ids) == raw.decode(ids, skip_special_tokens=False)


def test_chat_template_is_the_one_of_the_processor() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stored = json.loads((MODEL / "chat_template.json").read_text(encoding="utf-8"))
    assert stored["chat_template"] == tokenizer.chat_template
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_weights_are_classic_and_small() -> None:
    path = MODEL / "model.safetensors"
    assert path.stat().st_size <= 8_600_000
    with safe_open(path, "np") as file:
        names = set(file.keys())
        norm = file.get_slice("model.norm.weight").get_dtype()
    assert norm in {"F16", "BF16"}
    assert not any(name.startswith("lm_head") for name in names)
    assert {name.split(".")[0] for name in names} == {"model", "visual"}
    assert "model.layers.3.self_attn.q_proj.bias" in names
    assert "visual.merger.mlp.2.weight" in names


def test_all_assets_are_small() -> None:
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 25_000_000


@pytest.mark.parametrize(
    ("part", "seed", "count"),
    [("calibration", CALIBRATION_SEED, 48), ("evaluation", EVALUATION_SEED, 200)],
)
def test_pictures_and_questions_come_from_the_generator(part: str, seed: int, count: int) -> None:
    folder = ASSETS / part
    prompts = yaml.safe_load((folder / "prompts.yaml").read_text(encoding="utf-8"))
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    names = {path.name for path in (folder / "images").iterdir()}
    assert len(names) == count
    assert set(prompts) == set(answers) == names
    for picture in draw_pictures(seed, count)[:20]:
        assert prompts[picture.name] == [q.prompt for q in picture.questions]
        assert answers[picture.name] == [q.answer for q in picture.questions]
        with Image.open(folder / "images" / picture.name) as image:
            assert np.array_equal(np.asarray(image), picture.pixels)


def test_text_is_long_enough_and_parts_share_no_paragraph() -> None:
    calibration, evaluation = (
        (ASSETS / f"{part}.txt").read_text(encoding="utf-8")
        for part in ("calibration", "evaluation")
    )
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert len(tokenizer.encode(calibration).ids) >= 64 * 512
    assert len(tokenizer.encode(evaluation).ids) >= 12 * 512
    assert not set(calibration.splitlines()) & set(evaluation.splitlines())
    assert evaluation == write_text(EVALUATION_SEED, EVALUATION_TEXT)
