"""The figures of the shipped model: its scores, and what static int8 and each remedy make of it."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from training.architecture import StateDict, load_classic_state
from training.assets import (
    CALIBRATION_PICTURES,
    CALIBRATION_SEED,
    EVALUATION_SEED,
    draw_pictures,
)
from training.batches import Batch, Sampler
from training.forward import labels_of
from training.outliers import (
    Strengths,
    add_outliers,
    fold_norms,
    layer_count,
    scale_up_rows,
    to_float64,
    turn_residual,
)
from training.score import Score, load_model, perplexity, read_samples, score
from training.static_int8 import balance_rows, hadamard, observe, quantized, random_signs
from training.statistics import ResidualStatistics, run_batches
from training.tokenizer import special_id

Remedy = Callable[[StateDict], None]
_PICTURES = 80  # of the evaluation set, for the simulation


def shipped_figures(
    out: Path, model: Qwen2VLForConditionalGeneration, trained: StateDict, outlying: StateDict
) -> dict[str, Any]:
    """Scores of the saved folder, and how well the outliers kept the function."""
    folder = out / "qwen2vl-tiny"
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


REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "nothing": (),
    "fusion": (fold_norms,),
    "rotation": (rotate,),
    "rescaling": (balance_up,),
    "fusion+rescaling": (balance_up, fold_norms),
    "rotation+rescaling": (balance_up, rotate),
}


def damage_figures(
    out: Path,
    model: Qwen2VLForConditionalGeneration,
    trained: StateDict,
    statistics: ResidualStatistics,
    strengths: Strengths | None = None,
) -> dict[str, dict[str, str]]:
    """Exact match and log-probability under static W8A8, per kind of outlier and per remedy."""
    strengths = strengths or Strengths()
    nothing = replace(strengths, turn=False, gain_spread=0.0, large_gains=(), up_factors=())
    kinds = {
        "none": nothing,
        "basis": replace(nothing, turn=True),
        "gains": replace(
            nothing, gain_spread=strengths.gain_spread, large_gains=strengths.large_gains
        ),
        "up/down": replace(nothing, up_factors=strengths.up_factors),
        "all": strengths,
    }
    simulation = _Simulation(out, model)
    rows: dict[str, dict[str, str]] = {}
    for kind, chosen in kinds.items():
        outlying = add_outliers(trained, statistics.covariance, statistics.loudness, chosen)
        for remedy, changes in REMEDIES.items():
            state = to_float64(outlying)
            for change in changes:
                change(state)
            rows[f"{kind} | {remedy}"] = {
                profile: simulation.measure(state, profile)
                for profile in ("mllm-v1-vl", "mllm-v1-text")
            }
            print(f"{kind} | {remedy}", rows[f"{kind} | {remedy}"], flush=True)
    return rows


class _Simulation:
    """Calibration and evaluation batches of the shipped data, and the model they run through."""

    def __init__(self, out: Path, model: Qwen2VLForConditionalGeneration) -> None:
        tokenizer = Tokenizer.from_file(str(out / "qwen2vl-tiny" / "tokenizer.json"))
        sampler = Sampler(tokenizer, CALIBRATION_SEED, 40_000)
        self.model = model
        self.end = special_id(tokenizer, "<|im_end|>")
        self.calibration = [
            *_picture_batches(sampler, CALIBRATION_SEED, CALIBRATION_PICTURES),
            sampler.texts(8, 512),
        ]
        self.evaluation = list(_picture_batches(sampler, EVALUATION_SEED, _PICTURES))
        model.set_attn_implementation("eager")

    def measure(self, state: StateDict, profile: str) -> str:
        """Exact match and log-probability of weights under a profile."""
        load_classic_state(self.model, {k: v.to(torch.bfloat16).float() for k, v in state.items()})
        ranges = observe(self.model, lambda: run_batches(self.model, self.calibration))
        with quantized(self.model, ranges, profile):
            logits = run_batches(self.model, self.evaluation)
        result = packed_score(logits, self.evaluation, self.end)
        return f"{result.exact_match:.3f} {result.log_probability:.3f}"


def _picture_batches(sampler: Sampler, seed: int, count: int) -> list[Batch]:
    pictures = draw_pictures(seed, count)
    parts = [pictures[i : i + 16] for i in range(0, count, 16)]
    return [
        sampler.pack([p.scene for p in part], [p.pixels for p in part], [p.questions for p in part])
        for part in parts
    ]


def packed_score(logits: list[torch.Tensor], batches: list[Batch], end: int) -> Score:
    """`score` on packed batches: an answer is a run of labels up to the token `end`."""
    right, count, log_probability, margin = 0, 0, 0.0, 0.0
    for rows, batch in zip(logits, batches, strict=True):
        labels = labels_of(batch)
        wanted = labels[:, None]
        chosen = rows.gather(1, wanted)
        margins = chosen - rows.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
        ends = (labels == end).nonzero().flatten() + 1
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        least = torch.stack([part.min() for part in torch.split(margins[:, 0], sizes)])
        right += int((least > 0).sum())
        count += len(sizes)
        margin += float(least.sum())
        log_probability += float(rows.log_softmax(1).gather(1, wanted).sum())
    return Score(count, right / count, log_probability / count, margin / count)
