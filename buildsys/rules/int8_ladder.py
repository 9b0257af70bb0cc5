"""The ladder of remedies of rule `int8-checkpoint`, and the search on it for a quality.

Rungs in order of what they cost: ranges at the maximum, clipped ranges, GPTQ rounding (minutes
of building, nothing at run time), then shadow layers (time on the device), as many as the recipe
allows. Each is written and run as the runtime would run it; the first that is good enough stays.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from buildsys.models.open import Model
    from buildsys.models.samples import Samples
    from buildsys.rules.spec import StepContext


@dataclass(frozen=True)
class Rung:
    """One way to make the checkpoint. clipped: at the scales file's clipped ranges; shadow: how
    many layers get one."""

    clipped: bool = True
    gptq: bool = False
    shadow: int = 0

    @property
    def name(self) -> str:
        ranges = "clipped" if self.clipped else "absmax"
        rounding = ", gptq" if self.gptq else ""
        return f"{ranges}{rounding}" + (f", {self.shadow} shadow layers" if self.shadow else "")


@dataclass(frozen=True)
class Choice:
    """The rung that was written. search: of a search for a quality what was asked for, chosen
    and tried."""

    rung: Rung
    search: Mapping[str, Any] | None = None


def rungs(*, clipped: bool, gptq: bool, shadow: int) -> Iterator[Rung]:
    """The ladder, as far as the step was given what its rungs need."""
    yield Rung(clipped=False)
    if clipped:
        yield Rung(clipped=True)
    if gptq:
        yield Rung(clipped=clipped, gptq=True)
    layers = 1
    while layers < shadow:
        yield Rung(clipped, gptq, layers)
        layers *= 2
    if shadow:
        yield Rung(clipped, gptq, shadow)


def search(
    step: StepContext,
    model: Model,
    ladder: Sequence[Rung],
    write: Callable[[Rung, Path], None],
    target: str,
) -> Choice:
    """Write rung after rung to the step's output until one is within `quality`; notes what was
    tried. Raises StepError with all figures where none is."""
    wanted: Any = step.options["quality"]
    texts = _texts(step, model)
    tried: dict[str, float] = {}
    plain = _nll(model, None, texts, target)
    with tempfile.TemporaryDirectory() as folder:
        for rung in ladder:
            made = Path(folder) / "int8.pth"
            write(rung, made)
            tried[rung.name] = _increase(plain, _nll(model, made, texts, target))
            step.log.info("%s: perplexity %+.2f %%", rung.name, 100 * tried[rung.name])
            if tried[rung.name] <= wanted["within"]:
                shutil.move(made, step.out)
                told = {**wanted, "chosen": rung.name, "tried": tried}
                step.note("quality", told)
                return Choice(rung, told)
    figures = "; ".join(f"{name}: {100 * value:+.2f} %" for name, value in tried.items())
    raise StepError(
        f"no rung is within {100 * wanted['within']:g} % of fp32's perplexity ({figures})",
        remedy="Allow more, give `samples` for GPTQ, clip the scales, or allow shadow layers.",
    )


def _texts(step: StepContext, model: Model) -> list[Samples]:
    from buildsys.models.samples import open_samples

    return [
        open_samples(model, given.kind, given.paths, given.options) for given in step.inputs["text"]
    ]


def _nll(
    model: Model, path: Path | None, texts: Sequence[Samples], target: str
) -> Mapping[str, list[float]]:
    """Sums of -log p and numbers of predictions, window by window."""
    from buildsys.models.runtime import load_module
    from buildsys.models.scoring import score_text
    from buildsys.models.simulate import simulate
    from buildsys.models.variant import open_variant

    variant = None if path is None else open_variant(path, model.family)
    module = load_module(model, None if variant is None else variant.tensors)
    if variant is not None:
        simulate(module, model.family, variant, target)
    scores = [score for text in texts for score in score_text(module, text)]
    return {"nll": [s.nll for s in scores], "predictions": [float(s.predictions) for s in scores]}


def _increase(plain: Mapping[str, list[float]], found: Mapping[str, list[float]]) -> float:
    from buildsys.quant.metrics import perplexity_difference

    counts = [int(count) for count in plain["predictions"]]
    return perplexity_difference(plain["nll"], found["nll"], counts).relative
