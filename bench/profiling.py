"""Profiling: a forward pass with statistics of every linear beside the same pass without.

    python bench/profiling.py [--json] [--shape smollm2-135m --shape qwen2-vl-2b] [--layers 4]
        [--samples 16] [--tokens 512] [--repeat 3]

Random models of published shapes (bench/synth.py) with a few layers and text alone, float32,
one thread; the head runs in all, as profiling runs it. Of every shape: maximum, top-k, mean and
deviation by the compiled pass (where numba is installed) and by numpy; and the histograms that
`clipping: kl` takes of some tokens' rows in a second pass, over a pass through the layers. All take
turns in one process on every repetition. Figures are process CPU seconds (the least of the
repetitions), the ratio is with over without: 1.10 is an overhead of 10 %. --json prints a list of
{what, ours, peer, unit, ratio}, where the peer is the forward pass alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread, said before the libraries read it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from synth import SHAPES, write_checkpoint

from buildsys.models.layer_walk import walk_layers
from buildsys.models.open import Model, open_model
from buildsys.models.profile import logit_blocks, profile
from buildsys.models.runtime import hidden_states, load_module
from buildsys.models.samples import Sample, TextSamples
from buildsys.models.site_rows import sites_of
from buildsys.quant import observers
from buildsys.quant.compiled import available

# Of a histogram, as `quant.clipping` takes it.
_BINS = 2048


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


def layers_alone(model: Model, text: TextSamples, histograms: bool) -> None:
    """All samples through the layers, one layer at a time; with histograms of what `clipping: kl`
    keeps of every linear's input and output."""
    with tempfile.TemporaryDirectory() as folder:
        for visit in walk_layers(model, model.tensors, [text], Path(folder)):
            if histograms:
                sites = sites_of(visit)
                for kind in sites.linears:
                    for x in (sites.input(kind), sites.output(kind)):
                        values = x.abs().flatten()
                        torch.histc(values, _BINS, 0.0, float(values.max()))
            else:
                for sample, state in zip(visit.samples, visit.states, strict=True):
                    visit.layerwise.run(visit.stage, sample, state)


def works(folder: Path, text: Callable[[int], TextSamples]) -> dict[str, Callable[[], object]]:
    """What is measured on the model in `folder`, by name."""
    model = open_model(folder)
    module = load_module(model)
    head: Any = module.get_submodule("lm_head")
    samples = text(model.config.vocab_size)

    def forward() -> None:
        for sample in samples:
            for _ in logit_blocks(head.weight, hidden_states(module, sample)):
                pass

    def observed(many: int) -> None:
        # The model is cut: whether to compile is decided as for many layers and samples.
        observers.MANY = many
        profile(model.family, module, [samples])

    found: dict[str, Callable[[], object]] = {
        "forward": forward,
        "numpy": lambda: observed(sys.maxsize),
        "layers": lambda: layers_alone(model, samples, histograms=False),
        "histograms": lambda: layers_alone(model, samples, histograms=True),
    }
    return found | ({"compiled": lambda: observed(0)} if available() else {})


def compare(folder: Path, samples: int, tokens: int, repeat: int) -> list[dict[str, object]]:
    """Take each work's time by turns, after one round that does not count."""
    to_do = works(folder, lambda vocabulary: random_samples(samples, tokens, vocabulary))
    rounds = [{name: seconds_of(work) for name, work in to_do.items()} for _ in range(repeat + 1)]
    least = {name: min(each[name] for each in rounds[1:]) for name in to_do}
    rows = []
    for what, ours, peer in (
        ("maximum, top-k, mean, deviation; compiled", "compiled", "forward"),
        ("maximum, top-k, mean, deviation; numpy", "numpy", "forward"),
        ("rows and histograms of clipping: kl", "histograms", "layers"),
    ):
        if ours in least:
            row = {"what": what, "ours": round(least[ours], 3), "peer": round(least[peer], 3)}
            ratio = round(least[ours] / least[peer], 3)
            rows.append({**row, "unit": "CPU seconds", "ratio": ratio})
    return rows


def main() -> None:
    """Parse, make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in args.shape or ["smollm2-135m"]:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), shape, layers=args.layers, blocks=1)
            for row in compare(Path(folder), args.samples, args.tokens, args.repeat):
                size = f"{args.layers} layers, {args.samples} x {args.tokens} tokens"
                rows.append({**row, "what": f"{shape}, {size}: {row['what']}"})
                if not args.json:
                    with_, without = row["ours"], row["peer"]
                    print(
                        f"{rows[-1]['what']}: with {with_} s, without {without} s, x{row['ratio']}"
                    )
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
