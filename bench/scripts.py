"""A whole build beside the work of mllm's own scripts: CPU seconds and peak memory of each stage.

    qbuild build recipes/smollm2.yaml model/
    python bench/scripts.py build/smollm2/model [--samples 2] [--tokens 256] [--json]

qbuild's rules run cold, each in a process of its own (bench/memory.py), with nearest rounding;
`bench/mllm_scripts.py` is the scripts' work restated, on the same model, rotation and number of
tokens; the quantizer there is ggml's own C. One thread. Memory is anonymous memory beyond what
`import torch` takes, in MiB. Two rows of the scripts may stand against one of qbuild's: it reads
the model where they read a file that they have written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory
import mllm_scripts

MIB = 1 << 20
TEXT = Path(__file__).parents[1] / "recipes" / "assets" / "text" / "sherlock.txt"
# What one looks at together: qbuild's rules, and the scripts' stages.
STAGES = (
    ("ranges", ("rotation", "activation-scales"), ("profile",)),
    ("int8.pth", ("int8-checkpoint",), ("export",)),
    ("int8.mllm", ("mllm-file",), ("convert int8",)),
    ("q4k.mllm", ("mllm-quantize",), ("rotated", "convert float", "quantize")),
)


def compare(model: Path, work: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row of the table for each artifact, then the whole."""
    base, _ = memory.measure(["--import-torch"])
    (work / "text.txt").write_bytes(TEXT.read_bytes())
    told = json.dumps({name: options[name] for name in ("samples", "tokens")})
    total: dict[str, Any] = {"what": "all", "ours_cpu": 0.0, "ours_mib": 0, "theirs_cpu": 0.0}
    total["theirs_mib"] = 0
    write_windows(model, work, options)
    for what, rules, stages in STAGES:
        row: dict[str, Any] = {"what": what}
        runs = {
            "ours": [["--one", rule, str(model), str(work), told] for rule in rules],
            "theirs": [["--stage", stage, str(model), str(work)] for stage in stages],
        }
        for side, each in runs.items():
            file = memory.__file__ if side == "ours" else __file__
            measured = [memory.measure(argv, file) for argv in each]
            row[f"{side}_cpu"] = round(sum(cpu for _, cpu in measured), 1)
            row[f"{side}_mib"] = round(max(peak - base for peak, _ in measured) / MIB)
            total[f"{side}_cpu"] = round(total[f"{side}_cpu"] + row[f"{side}_cpu"], 1)
            total[f"{side}_mib"] = max(total[f"{side}_mib"], row[f"{side}_mib"])
        yield row
    yield total


def write_windows(model: Path, work: Path, options: dict[str, Any]) -> None:
    """The same tokens for the scripts, and the shapes that a .mllm of version 1 does not store."""
    import numpy as np

    from buildsys.models.open import open_model
    from buildsys.models.samples import open_samples

    opened = open_model(model)
    counts = {name: options[name] for name in ("samples", "tokens")}
    samples = open_samples(opened, "text", {"path": work / "text.txt"}, counts)
    np.save(work / "windows.npy", np.concatenate([sample.input_ids.numpy() for sample in samples]))
    shapes = {name: list(shape) for name, shape in opened.family.shapes.items()}
    (work / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--work", help="where to put the intermediate files")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for row in compare(args.model.absolute(), Path(folder), vars(args)):
            found.append(row)
            if not args.json:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] == ["--stage"]:
        mllm_scripts.run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
