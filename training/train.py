"""Makes qwen2vl-tiny from nothing: tokenizer, training, outliers, model folder, data, figures.

    python -m training.train --out DIR [--weights DIR/trained.safetensors] [--massive]

One thread, about 21 CPU-minutes with AMX or AVX512-BF16. DIR gets `trained.safetensors`
(before the outliers), `qwen2vl-tiny/`, the recipe's data, and `figures.json`. With --weights
the training is left out, and what comes after it is done again. With --massive the folder is
`qwen2vl-tiny-massive/`, whose residual stream has a massive constant (training/massive.py).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from training.adapt import Adaptation, adapt
from training.architecture import (
    StateDict,
    classic_config,
    classic_state,
    load_classic_state,
    new_model,
    save_folder,
)
from training.assets import TRAINING_SEED, write_assets
from training.batches import Sampler
from training.figures import shipped_figures
from training.fit import Schedule, fit
from training.massive import clear_channels, write_constant
from training.outliers import Strengths, add_outliers
from training.packed import packed_score, picture_batches, run_batches
from training.statistics import channel_statistics, residual_statistics
from training.tokenizer import special_id, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STORED = torch.bfloat16
TEXT_CHARACTERS = 6_000_000
ADAPTATION_SEED = 1500
# Of the constants that the second training made the model used to. All of them would leave the
# outliers exact to 1.2e-4 in float32, this to 7.5e-5.
WRITTEN = 0.8


def train(tokenizer: "Tokenizer", out: Path, steps: int) -> tuple[StateDict, float]:
    """Train from random weights, or on from DIR/checkpoint.pt: a killed run is not lost.

    Returns float32 weights under classic names, and the CPU-minutes that they took.
    """
    model = new_model(classic_config(tokenizer, STORED), seed=0)
    sampler = Sampler(tokenizer, TRAINING_SEED, TEXT_CHARACTERS)
    held_out = picture_batches(sampler, TRAINING_SEED + 1, 48)
    end = special_id(tokenizer, "<|im_end|>")

    def report(step: int, line: str) -> None:
        print(f"step {step:5d}  {line}", flush=True)
        if step % 250 == 0:
            print(packed_score(run_batches(model, held_out), held_out, end), flush=True)

    schedule = replace(Schedule(), steps=steps)
    minutes = fit(model, sampler, schedule, out / "checkpoint.pt", report)
    state = classic_state(model)
    save_file(state, out / "trained.safetensors")
    return state, minutes


def make_massive(
    tokenizer: "Tokenizer", out: Path, first: StateDict, adaptation: Adaptation
) -> tuple[StateDict, float]:
    """The second training, and a massive constant in the residual (training/massive.py).

    Returns float32 weights under classic names, and the CPU-minutes that they took.
    """
    model = new_model(classic_config(tokenizer, STORED), seed=0)
    load_classic_state(model, first)
    statistics = channel_statistics(model, tokenizer)
    load_classic_state(model, clear_channels(first, statistics))
    sampler = Sampler(tokenizer, ADAPTATION_SEED, TEXT_CHARACTERS // 4)
    held_out = picture_batches(sampler, TRAINING_SEED + 1, 48)
    end = special_id(tokenizer, "<|im_end|>")
    cleared = packed_score(run_batches(model, held_out), held_out, end)
    print("channels cleared:", cleared, flush=True)

    def report(step: int, line: str) -> None:
        print(f"step {step:5d}  {line}", flush=True)
        if step % 80 == 0:
            print(packed_score(run_batches(model, held_out), held_out, end), flush=True)

    minutes = adapt(model, sampler, statistics.typical, adaptation, report)
    save_file(classic_state(model), out / "damped.safetensors")
    constants = tuple(WRITTEN * each for each in adaptation.massive.constants)
    massive = replace(adaptation.massive, constants=constants)
    head_dim = statistics.values.shape[-1]
    exact = write_constant(classic_state(model), massive, statistics.typical, head_dim)
    return {name: tensor.float().contiguous() for name, tensor in exact.items()}, minutes


def main() -> None:
    """Do everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--weights", type=Path, help="trained weights; leaves the training out")
    parser.add_argument("--massive", action="store_true", help="see training/massive.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread costs 20 % more CPU time than it saves
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    minutes: float | None = None
    if arguments.weights:
        trained: StateDict = load_file(arguments.weights)
    else:
        trained, minutes = train(tokenizer, out, arguments.steps)
    if arguments.massive:
        trained, _ = make_massive(tokenizer, out, trained, Adaptation())
        save_file(trained, out / "massive.safetensors")
    write_assets(out)
    config = classic_config(tokenizer, STORED)
    model = new_model(config, seed=0)
    load_classic_state(model, trained)
    statistics = residual_statistics(model, tokenizer)
    outlying = add_outliers(trained, statistics.covariance, statistics.loudness, Strengths())
    folder = out / ("qwen2vl-tiny-massive" if arguments.massive else "qwen2vl-tiny")
    save_folder(folder, config, outlying, tokenizer)
    figures = {
        "training_cpu_minutes": minutes and round(minutes, 1),
        **shipped_figures(folder, model, trained, outlying),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
