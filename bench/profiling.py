"""Profiling: a forward pass with statistics of every linear beside the same pass without.

    python bench/profiling.py [--json] [--shape smollm2-135m] [--layers 4] [--samples 16]
        [--tokens 512] [--repeat 3]

A random model of a published shape (bench/synth.py) with a few layers and text alone, float32,
one thread; the head runs in both, as profiling runs it. Both take turns in one process on every
repetition. Figures are process CPU seconds (the least of the repetitions), the ratio is with
over without: 1.10 is an overhead of 10 %. --json prints a list of {what, ours, peer, unit,
ratio}, where the peer is the forward pass alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread, said before the libraries read it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from synth import SHAPES, write_checkpoint

from buildsys.models.open import open_model
from buildsys.models.profile import logit_blocks, profile
from buildsys.models.runtime import hidden_states, load_module
from buildsys.models.samples import Sample, TextSamples


def random_samples(count: int, tokens: int, vocabulary: int) -> TextSamples:
    """Windows of tokens drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return TextSamples(
        tuple(
            Sample(torch.randint(vocabulary, (1, tokens), generator=generator))
            for _ in range(count)
        )
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Process CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(folder: Path, samples: int, tokens: int, repeat: int) -> dict[str, object]:
    """Profile the model in `folder`, and run it, by turns."""
    model = open_model(folder)
    module = load_module(model)
    head: Any = module.get_submodule("lm_head")
    text = random_samples(samples, tokens, model.config.vocab_size)

    def forward() -> None:
        for sample in text:
            for _ in logit_blocks(head.weight, hidden_states(module, sample)):
                pass

    forward()
    alone, observed = [], []
    for _ in range(repeat):
        alone.append(seconds_of(forward))
        observed.append(seconds_of(lambda: profile(model.family, module, [text])))
    return {
        "what": f"statistics over forward, {model.config.num_hidden_layers} layers, "
        f"{samples} x {tokens} tokens",
        "ours": round(min(observed), 3),
        "peer": round(min(alone), 3),
        "unit": "CPU seconds",
        "ratio": round(min(observed) / min(alone), 3),
    }


def main() -> None:
    """Parse, make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.shape, layers=args.layers, blocks=1)
        row = compare(Path(folder), args.samples, args.tokens, args.repeat)
    if args.json:
        print(json.dumps([row], indent=1))
        return
    print(f"{row['what']}: with {row['ours']} s, without {row['peer']} s, x{row['ratio']}")


if __name__ == "__main__":
    main()
