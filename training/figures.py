"""The figures of the shipped model: its scores, and what static int8 and each remedy make of it.

    python -m training.figures DIR

adds the second half, `static_int8`, to the figures.json that training.train left in DIR.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from training.architecture import StateDict, classic_config, load_classic_state, new_model
from training.assets import (
    CALIBRATION_PICTURES,
    CALIBRATION_SEED,
    EVALUATION_PICTURES,
    EVALUATION_SEED,
)
from training.batches import Sampler
from training.outliers import (
    Strengths,
    add_outliers,
    fold_norms,
    layer_count,
    scale_up_rows,
    turn_residual,
)
from training.packed import packed_score, picture_batches, run_batches
from training.score import Score, load_model, perplexity, read_samples, score
from training.static_int8 import PROFILES, balance_rows, hadamard, observe, quantized, random_signs
from training.statistics import residual_statistics
from training.tokenizer import special_id

Remedy = Callable[[StateDict], None]


def shipped_figures(
    folder: Path, model: Qwen2VLForConditionalGeneration, trained: StateDict, outlying: StateDict
) -> dict[str, Any]:
    """Scores of the saved folder, with the data beside it, and how well the outliers kept the
    function."""
    out = folder.parent
    samples = list(read_samples(folder, out / "evaluation"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer((out / "evaluation.txt").read_text(encoding="utf-8"))["input_ids"]
    model.set_attn_implementation("sdpa")
    model.eval()
    load_classic_state(model, trained)
    before = score(model, samples)
    figures: dict[str, Any] = {"trained_float32": asdict(before)}
    largest = 0.0
    for sample in samples[:: len(samples) // 20]:
        with torch.inference_mode():
            load_classic_state(model, trained)
            was = model(**sample.inputs).logits
            load_classic_state(model, {k: v.float() for k, v in outlying.items()})
            largest = max(largest, (model(**sample.inputs).logits - was).abs().max().item())
    figures["outliers_logit_difference_float32"] = largest
    for dtype in (torch.float16, torch.bfloat16):
        load_classic_state(model, {k: v.to(dtype).float() for k, v in outlying.items()})
        figures[f"stored_{str(dtype).removeprefix('torch.')}"] = asdict(score(model, samples))
    shipped = load_model(folder)
    figures["shipped"] = asdict(score(shipped, samples))
    figures["shipped_perplexity"] = perplexity(shipped, text)
    figures["shipped_bytes"] = (folder / "model.safetensors").stat().st_size
    return figures


def rotate(state: StateDict) -> None:
    """Norm fusion, then a randomized Hadamard rotation of the residual: repairs turn_residual."""
    fold_norms(state)
    hidden = len(state["model.norm.weight"])
    turn_residual(state, hadamard(hidden) * random_signs(hidden, seed=5)[:, None])


def balance_up(state: StateDict) -> None:
    """Bring the loud rows of every up_proj down again: repairs scale_up_rows.

    A row's loudness is read off its weights; a tool would profile it.
    """
    for layer in range(layer_count(state)):
        prefix = f"model.layers.{layer}"
        gain = state[f"{prefix}.post_attention_layernorm.weight"]
        up = state[f"{prefix}.mlp.up_proj.weight"]
        factors = balance_rows((up * gain).square().mean(1).sqrt().tolist())
        scale_up_rows(state, layer, torch.arange(len(up)), factors)


_REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "nothing": (),
    "fusion": (fold_norms,),
    "rotation": (rotate,),
    "rescaling": (balance_up,),
    "fusion, rescaling": (balance_up, fold_norms),
    "rotation, rescaling": (balance_up, rotate),
}
# Kind of outliers, remedy: each kind alone with its own remedy, then the shipped mixture.
_ROWS = (
    ("none", "nothing"),
    ("basis", "nothing"),
    ("basis", "rotation"),
    ("gains", "nothing"),
    ("gains", "fusion"),
    ("up/down", "nothing"),
    ("up/down", "rescaling"),
    ("all", "nothing"),
    ("all", "fusion"),
    ("all", "rescaling"),
    ("all", "fusion, rescaling"),
    ("all", "rotation"),
    ("all", "rotation, rescaling"),
)


def strengths_of(kind: str, full: Strengths) -> Strengths:
    """`full` with one kind of outlier only ("none", "basis", "gains", "up/down"), or "all"."""
    nothing = replace(full, turn=False, gain_spread=0.0, large_gains=(), up_factors=())
    return {
        "none": nothing,
        "basis": replace(nothing, turn=full.turn),
        "gains": replace(nothing, gain_spread=full.gain_spread, large_gains=full.large_gains),
        "up/down": replace(nothing, up_factors=full.up_factors),
        "all": full,
    }[kind]


def damage_figures(
    out: Path, trained: StateDict, strengths: Strengths, pictures: int, profiles: Sequence[str]
) -> list[dict[str, Any]]:
    """Scores under static W8A8, one row for each pair of outliers and remedy, and profile."""
    tokenizer = Tokenizer.from_file(str(out / "qwen2vl-tiny" / "tokenizer.json"))
    model = new_model(classic_config(tokenizer, torch.bfloat16), seed=0)
    load_classic_state(model, trained)
    statistics = residual_statistics(model, tokenizer)
    simulation = Simulation(tokenizer, model, pictures)
    rows = []
    for kind, remedy in _ROWS:
        state = add_outliers(
            trained, statistics.covariance, statistics.loudness, strengths_of(kind, strengths)
        )
        for change in _REMEDIES[remedy]:
            change(state)
        for profile in profiles:
            figures = asdict(simulation.measure(state, profile))
            rows.append({"outliers": kind, "remedy": remedy, "profile": profile, **figures})
            print(rows[-1], flush=True)
    return rows


class Simulation:
    """Calibration and evaluation batches of the shipped data, and the model they run through."""

    def __init__(
        self, tokenizer: Tokenizer, model: Qwen2VLForConditionalGeneration, pictures: int
    ) -> None:
        sampler = Sampler(tokenizer, CALIBRATION_SEED, 40_000)
        self.model = model
        self.end = special_id(tokenizer, "<|im_end|>")
        self.calibration = [
            *picture_batches(sampler, CALIBRATION_SEED, CALIBRATION_PICTURES),
            sampler.texts(8, 512),
        ]
        self.evaluation = list(picture_batches(sampler, EVALUATION_SEED, pictures))
        model.set_attn_implementation("eager")

    def measure(self, state: StateDict, profile: str) -> Score:
        """Scores of weights, rounded to the stored type, under a profile."""
        load_classic_state(self.model, {k: v.to(torch.bfloat16).float() for k, v in state.items()})
        ranges = observe(self.model, lambda: run_batches(self.model, self.calibration))
        with quantized(self.model, ranges, profile):
            logits = run_batches(self.model, self.evaluation)
        return packed_score(logits, self.evaluation, self.end)


def main() -> None:
    """Add the table of static int8 to DIR/figures.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--pictures", type=int, default=EVALUATION_PICTURES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.dir
    path = out / "figures.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    trained = load_file(out / "trained.safetensors")
    figures["static_int8"] = damage_figures(
        out, trained, Strengths(), arguments.pictures, list(PROFILES)
    )
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
