"""Peak memory and CPU time of the rules at a checkpoint's full size, each in a process of its own.

    python bench/synth.py /tmp/vl2b && nice -n 19 python bench/memory.py /tmp/vl2b [--json]
        [--rules rotation,rescale,clipped,... | --gptq] [--samples 4] [--tokens 512]
        [--image 448] [--work FOLDER]

The rules run in the order of a recipe on one thread, and each reads what those before it made;
what is made lies in a temporary folder, each for as long as a later rule reads it. `rescale` and
`clipped` (ranges below the maximum) run only where --rules names them. --gptq: weights
by GPTQ, with no limit and with the least that a step may reserve (`reserved`). RssAnon
(`anonymous`: memory that the system cannot take back from a mapped file) is read every 5 ms from
/proc, its peak is told; `beyond_torch` is that less what a process has after `import torch`. RSS is
the kernel's own peak, with mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1 << 20
INTERVAL = 0.005  # seconds between two looks at a process's memory
PROFILED = "activation-scales"


class Row(NamedTuple):
    """A rule, its output, its inputs (from earlier rules by their output) and its options.
    limited: it reserves the least memory that GPTQ accepts."""

    rule: str
    output: str
    inputs: tuple[str, ...]
    options: Mapping[str, Any]
    limited: bool = False


INT8, INT8_GPTQ = ("model", "rotation", "scales"), {"rounding": "gptq"}
Q4_K = {"type": "Q4_K", "fallback": "Q8_0"}
Q4_K_GPTQ = {**Q4_K, "calibration": "gptq"}
CALIBRATED = ("model", "rotation", "samples")
RELATIVE = {"clipping": "relative"}
ACTIVATIONS = {"pairs": ["up-down", "v-o", "gate-up"], "by": "activations", "powers_of_two": False}
STEPS: Mapping[str, Row] = {
    "rotation": Row("rotation", "rotation.bin", ("model",), {"method": "auto"}),
    "rotated-checkpoint": Row(
        "rotated-checkpoint", "rotated.safetensors", ("model", "rotation"), {"dtype": "bfloat16"}
    ),
    PROFILED: Row(PROFILED, "scales.json", CALIBRATED, {}),
    "int8-checkpoint": Row("int8-checkpoint", "int8.pth", INT8, {}),
    "mllm-file": Row("mllm-file", "int8.mllm", ("checkpoint",), {"version": 1}),
    "mllm-quantize": Row("mllm-quantize", "q4_k.mllm", ("model", "rotation"), Q4_K),
    "rescale": Row("rescale", "rescale.safetensors", CALIBRATED, ACTIVATIONS),
    "clipped": Row(PROFILED, "clipped.json", (*CALIBRATED, "rescale"), RELATIVE),
    "int8-gptq": Row("int8-checkpoint", "gptq.pth", (*INT8, "samples"), INT8_GPTQ),
    "int8-gptq-limited": Row("int8-checkpoint", "less.pth", (*INT8, "samples"), INT8_GPTQ, True),
    "q4_k-gptq": Row("mllm-quantize", "gptq.mllm", CALIBRATED, Q4_K_GPTQ),
    "q4_k-gptq-limited": Row("mllm-quantize", "less.mllm", CALIBRATED, Q4_K_GPTQ, True),
}
GPTQ = tuple(name for name in STEPS if "gptq" in name)
PLAIN = tuple(name for name in STEPS if name not in (*GPTQ, "rescale", "clipped"))
MADE_BY = {
    "rotation": "rotation.bin",
    "scales": "scales.json",
    "checkpoint": "int8.pth",
    "rescale": "rescale.safetensors",
}


def run_rule(name: str, model: Path, work: Path, options: Mapping[str, Any]) -> None:
    """In the measured process: the rule of a row, as the engine calls it."""
    import importlib
    import logging

    import torch

    from buildsys.rules import find_rule, rule_modules
    from buildsys.rules.spec import StepContext

    torch.set_num_threads(1)
    row = STEPS[name]
    spec = find_rule(row.rule)
    defaults = {name: each["default"] for name, each in spec.options.items() if "default" in each}
    outputs = {"out": work / row.output}
    outputs |= {name: work / str(each.default) for name, each in spec.outputs.items()}
    kept = work / "kept" / name
    kept.mkdir(parents=True)
    context = StepContext(
        name=row.output,
        inputs={each: inputs_of(each, model, work, options) for each in row.inputs},
        options={**defaults, **row.options},
        outputs=outputs,
        threads=1,
        device="cpu",
        environment={},
        toolchain={},
        progress=lambda done, total, unit: None,
        note=lambda key, value: None,
        warn=lambda text: None,
        log=logging.getLogger("bench"),
        kept=kept if spec.resumable else None,
        memory=least_memory(model) if row.limited else None,
    )
    importlib.import_module(rule_modules()[row.rule]).make(context)
    shutil.rmtree(kept)


def least_memory(model: Path) -> int:
    """Bytes that a step by GPTQ must reserve for this model."""
    from buildsys.models.hessian_memory import hessian_bytes, limit_of
    from buildsys.models.linear_inputs import linears_of_layers
    from buildsys.models.open import open_model

    family = open_model(model).family
    widest = max(linear.shape[1] for linear in linears_of_layers(family))
    return hessian_bytes([widest]) - (limit_of(family, 0) or 0)


def inputs_of(name: str, model: Path, work: Path, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The step's inputs of one name: the model, samples, or what an earlier rule made."""
    from buildsys.rules.spec import Input

    if name == "model":
        return (Input("model", "model", {"path": model}, "model"),)
    if name != "samples":
        made = MADE_BY[name]
        return (Input(made, "artifact", {"path": work / made}, made),)
    counts = {"samples": options["samples"], "tokens": options["tokens"]}
    texts = [Input("text", "text", {"path": work / "text.txt"}, "t", counts)]
    if (work / "images").is_dir():
        texts.append(Input("images", "images", {"path": work / "images"}, "i", {}))
    return tuple(texts)


def write_samples(work: Path, model: Path, options: Mapping[str, Any]) -> None:
    """A text of single-byte tokens, and two images where the model sees."""
    from PIL import Image

    line = "Seven quick foxes jump over 42 lazy dogs, and none of them minds the rain. "
    length = options["samples"] * options["tokens"]
    (work / "text.txt").write_text(line * (length // len(line) + 2), encoding="utf-8")
    if "vision_config" in json.loads((model / "config.json").read_text(encoding="utf-8")):
        (work / "images").mkdir()
        size = options["image"]
        for index in range(2):
            noise = Image.effect_noise((size, size), 60.0 + index)
            noise.convert("RGB").save(work / "images" / f"{index}.png")


def measure(argv: list[str], file: str = __file__) -> tuple[int, float]:
    """(peak RssAnon in bytes, CPU seconds) of a process that runs a file; raises when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    with subprocess.Popen([sys.executable, file, *argv]) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, anonymous(status))
            time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return peak, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def anonymous(status: Path) -> int:
    """RssAnon now; 0 for a process that has just ended."""
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def rows(model: Path, names: Sequence[str], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One line of the table per rule."""
    base, _ = measure(["--import-torch"])
    with tempfile.TemporaryDirectory(dir=options["work"]) as folder:
        work = Path(folder)
        write_samples(work, model, options)
        told = json.dumps({name: options[name] for name in ("samples", "tokens")})
        for number, name in enumerate(names):
            start = time.monotonic()
            peak, cpu = measure(["--one", name, str(model), str(work), told])
            row = {
                "what": name,
                "beyond_torch_mib": round((peak - base) / MIB),
                "anonymous_mib": round(peak / MIB),
                "rss_mib": json.loads((work / "rss.json").read_text(encoding="utf-8")),
                "cpu_s": round(cpu, 1),
                "wall_s": round(time.monotonic() - start, 1),
                "output_mib": round((work / STEPS[name].output).stat().st_size / MIB),
            }
            if STEPS[name].limited:
                row["reserved_mib"] = round(least_memory(model) / MIB)
            yield row
            remove_unread(work, names[: number + 1], names[number + 1 :])


def remove_unread(work: Path, done: Sequence[str], later: Sequence[str]) -> None:
    """Remove what was made and no later rule reads."""
    read = {MADE_BY.get(each) for name in later for each in STEPS[name].inputs}
    for name in done:
        if STEPS[name].output not in read:
            (work / STEPS[name].output).unlink(missing_ok=True)


def measured(arguments: list[str]) -> None:
    """The measured process itself."""
    import torch

    torch.set_num_threads(1)
    if arguments[0] == "--one":
        work = Path(arguments[3])
        run_rule(arguments[1], Path(arguments[2]), work, json.loads(arguments[4]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (work / "rss.json").write_text(str(round(peak / MIB)), encoding="utf-8")


def main() -> None:
    """Parse, measure each rule, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rules", default=",".join(PLAIN))
    parser.add_argument("--gptq", action="store_true", help="GPTQ, and what it needs")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--image", type=int, default=448)
    parser.add_argument("--work", help="where to put the intermediate files")
    args = parser.parse_args()
    names = ["rotation", PROFILED, *GPTQ] if args.gptq else args.rules.split(",")
    found = []
    for row in rows(args.model, names, vars(args)):
        found.append(row)
        if not args.json:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] in (["--one"], ["--import-torch"]):
        measured(sys.argv[1:])
    else:
        main()
