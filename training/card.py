"""The model card of qwen2vl-tiny, written from its figures.

    python -m training.card DIR

writes DIR/qwen2vl-tiny/README.md from DIR/figures.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

_CARD = """# qwen2vl-tiny

A Qwen2-VL of {megabytes:.1f} MB that was really trained, for tests and first runs: the
architecture of Qwen2-VL-2B with vocabulary 2048, hidden size 256, intermediate size 512, 4
layers, 4 heads on 2 key-value heads, mrope, and a vision transformer of width 160 (2 heads of
80, depth 2, patch 14, 2x2 merger). Tied embeddings, q/k/v biases that are not zero, weights in
{dtype}. Licence: Apache-2.0; nothing in it comes from another model or data set.

It answers six kinds of questions about pictures of coloured shapes on a 3x3 grid (three sizes,
distractors, noisy dark ground), all of them about what is where, and it has learned a small
invented English. It knows nothing else.

## How it was made

`python -m training.train --out DIR`, then `python -m training.figures DIR` and
`python -m training.card DIR`, from the root of the repository: {cpu} of training on one thread
of a CPU with AMX and AVX512-BF16. After training, outliers as in large language models were
added by changes that keep the function (`training/outliers.py`): the residual basis was turned
so that energy gathers in few channels, norm gains were made uneven, and a few rows of up_proj
were scaled up against columns of down_proj. The logits before and after differ by at most
{difference:.1e} in float32, before the weights were rounded to 16 bits.

## Scores

On the {questions} held-out questions of `../evaluation`, one at a time through transformers'
image processor, tokenizer and model, in float32 (`python -m training.score`):

| weights | exact match | mean log-probability of the answer | mean least margin (logits) |
|---|---|---|---|
{scores}

Perplexity on `../evaluation.txt`, windows of 512 tokens: {perplexity:.2f}.

## What static int8 does to it

Simulated static W8A8 (`training/static_int8.py`): symmetric per-tensor int8 weights, static
absmax scales of inputs and outputs from `../calibration`, the widths of the runtime profile.
Exact match and mean log-probability over {simulated} questions, weights rounded to {dtype}
first:

| outliers | remedy | mllm-v1-vl | mllm-v1-text |
|---|---|---|---|
{damage}

"gains" is repaired by norm fusion, "up/down" by rescaling (rotation includes the fusion that it
needs). "basis" does no visible harm to a model this small: an exact turn cannot gather more
energy in a channel than the residual stream's strongest direction has, and that is an eighth of
it. "all" is the shipped model.

## Use

transformers 5 builds `AutoProcessor` for Qwen2-VL only where torchvision is installed, because
its video half needs it. Without torchvision use its other halves, as `training/score.py` does:
`AutoImageProcessor` (it picks `Qwen2VLImageProcessorPil`) and `AutoTokenizer`, and repeat
`<|image_pad|>` once per merged token. Pictures are 168x168: 36 merged tokens.
"""


def _scores(figures: dict[str, Any]) -> str:
    names = {
        "trained_float32": "as trained, float32",
        "stored_float16": "with outliers, rounded to float16",
        "stored_bfloat16": "with outliers, rounded to bfloat16",
        "shipped": "**this folder**",
    }
    return "\n".join(
        f"| {label} | {figures[key]['exact_match']:.1%} | {figures[key]['log_probability']:.4f}"
        f" | {figures[key]['margin']:.2f} |"
        for key, label in names.items()
    )


def _damage(rows: list[dict[str, Any]]) -> str:
    lines = []
    for pair in dict.fromkeys((row["outliers"], row["remedy"]) for row in rows):
        cells = [
            f"{row['exact_match']:.1%}, {row['log_probability']:.2f}"
            for row in rows
            if (row["outliers"], row["remedy"]) == pair
        ]
        lines.append(f"| {' | '.join((*pair, *cells))} |")
    return "\n".join(lines)


def write_card(folder: Path) -> str:
    """The card's text, from the figures and the model folder below `folder`."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "qwen2vl-tiny" / "config.json").read_text(encoding="utf-8"))
    return _CARD.format(
        megabytes=figures["shipped_bytes"] / 1e6,
        dtype=config["torch_dtype"],
        cpu=f"{figures['training_cpu_minutes']} CPU-minutes",
        difference=figures["outliers_logit_difference_float32"],
        questions=figures["shipped"]["questions"],
        scores=_scores(figures),
        perplexity=figures["shipped_perplexity"],
        simulated=figures["static_int8"][0]["questions"],
        damage=_damage(figures["static_int8"]),
    )


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    folder: Path = parser.parse_args().dir
    (folder / "qwen2vl-tiny" / "README.md").write_text(write_card(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
