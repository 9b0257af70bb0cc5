"""Rule `evaluate`: what each variant of a model costs, as figures that gates can hold.

Perplexity on windows of text, and exact match, log-probability and margin of given answers, of
the model as it is (`fp32`) and of every variant: float, static int8 under a runtime's profile,
or block-quantized weights. The figures are written whatever they are; gates are read later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.model_inputs import model_input
from buildsys.rules.spec import ANY_FILE, InputSpec, Memory, Problem, Rule, StepContext

if TYPE_CHECKING:
    from torch import nn

    from buildsys.models.agreement import Agreement, Reference
    from buildsys.models.open import Model
    from buildsys.models.samples import Sample
    from buildsys.models.scoring import AnswerScore, WindowScore
    from buildsys.models.variant import Variant
    from buildsys.plan.graph import Plan, Ref, Step

BASELINE = "fp32"
# Pixels of questions are kept for the next variant up to this size, else made anew for each.
KEEP_BYTES = 256 * 2**20


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """Something to score on, and the profile that every int8 variant was made for."""
    if not step.inputs.get("text") and not step.inputs.get("images"):
        yield Problem("there is nothing to evaluate on", "Give `text`, `images` or both.")
    for ref in step.inputs.get("variants", ()):
        maker = _int8_maker(ref, plan)
        if maker is None:
            continue
        target, own = maker.options.get("target"), step.options.get("profile")
        if target != own:
            yield Problem(
                f"{ref.name} is made for target {target}, and is evaluated under profile {own}",
                f"Set `profile: {target}`, or `target` of {ref.name} to the same.",
                option="profile" if own is not None else None,
            )


def _int8_maker(ref: Ref, plan: Plan) -> Step | None:
    """The int8-checkpoint step that an artifact is, or was converted from."""
    maker = plan.steps.get(plan.producer.get(ref.name, "")) if ref.kind == "artifact" else None
    if maker is not None and maker.rule == "mllm-file":
        return next((_int8_maker(each, plan) for each in maker.inputs.get("checkpoint", ())), None)
    return maker if maker is not None and maker.rule == "int8-checkpoint" else None


RULE = Rule(
    name="evaluate",
    doc="metrics.json: perplexity, exact match, log-probability and margin of every variant.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "variants": InputSpec(
            "Checkpoints of this model: float, int8 of int8-checkpoint, or quantized .mllm.",
            many=True,
            required=False,
        ),
        "choices": InputSpec(
            "shadow_layers.json of int8 variants that were searched for a quality: what was "
            "chosen and tried goes into their figures.",
            kinds=ANY_FILE,
            many=True,
            required=False,
        ),
        "text": InputSpec("Text to predict.", kinds=("text",), many=True, required=False),
        "images": InputSpec(
            "Images with prompts and the right answers.",
            kinds=("images",),
            many=True,
            required=False,
        ),
    },
    options={
        "profile": {
            "enum": ["mllm-v1-text", "mllm-v1-vl", None],
            "default": None,
            "description": "How the runtime computes int8 variants; by default mllm-v1-vl for "
            "models with a vision tower, else mllm-v1-text. Must be the `target` they have.",
        },
        "shadow": {
            "enum": ["flags", "none"],
            "default": "flags",
            "description": "flags: layers that a threshold left unclipped are repaired on the CPU. "
            "none: they saturate, as under mllm's stock '-rotated' configs.",
        },
    },
    distributions=("torch", "transformers", "tokenizers", "pillow", "numpy"),
    worker="python",
    memory=Memory(largest=1.5),
    threads=2,
    float_sums=True,
    check=check,
)


@dataclass(frozen=True)
class Scores:
    """Everything that was measured of one variant, in the order of the samples."""

    windows: tuple[WindowScore, ...]
    answers: tuple[AnswerScore, ...]
    agreement: Agreement | None = None


def make(step: StepContext) -> None:
    """Score all variants. Raises ModelError naming a bad sample or tensor."""
    from buildsys.models.open import open_model
    from buildsys.models.variant import open_variant

    model = open_model(step.one("model").path)
    paths = _variants(step)
    texts, questions = _open_samples(step, model, "text"), _open_samples(step, model, "images")
    progress = _Progress(step, len(paths) + 1, texts, questions)
    profile = step.options["profile"] or _default_profile(model)

    rows: dict[str, dict[str, Any]] = {}
    baseline: Scores | None = None
    reference: Reference | None = None
    for name, path in {BASELINE: None, **paths}.items():
        variant = None if path is None else open_variant(path, model.family)
        module = _module(step, model, variant, name, profile)
        scores = _score(module, texts, questions, progress)
        if texts and reference is None:
            reference = _reference(module, texts)
        elif reference is not None:
            scores = replace(scores, agreement=reference.compare(module))
        del module
        baseline = scores if baseline is None else baseline
        rows[name] = figures(scores, baseline)
        if scores.agreement is not None:
            rows[name] |= agreement_figures(scores.agreement)
        if variant is not None:
            rows[name] |= {
                "bits_per_weight": variant.bits_per_weight(),
                "types": variant.types(),
            }
    for name, searched in _choices(step, rows).items():
        rows[name]["quality"] = searched
    content = {"variants": rows, "protocol": _protocol(step, profile, texts, questions)}
    text = json.dumps(rounded(content), indent=2, sort_keys=True, ensure_ascii=False)
    step.out.write_text(text + "\n", encoding="utf-8")


def _choices(step: StepContext, known: Collection[str]) -> dict[str, Any]:
    """Variant -> what its search for a quality chose and tried. Raises StepError where a file is
    of no variant here; a file without a search has nothing to say."""
    found = {}
    for given in step.inputs.get("choices", ()):
        content = json.loads(given.path.read_text(encoding="utf-8"))
        searched = content.get("quality") if isinstance(content, dict) else None
        if searched is None:
            continue
        name = searched["variant"]
        if name not in known:
            raise StepError(
                f"{given.name} tells how {name} was chosen, and that is no variant here",
                remedy="Give the shadow_layers.json of the variants that are evaluated.",
            )
        found[name] = {key: value for key, value in searched.items() if key != "variant"}
    return found


def figures(scores: Scores, baseline: Scores) -> dict[str, float]:
    """The figures of one variant beside the baseline's, all for smaller-is-better gates but
    `exact_match`, `answer_logprob`, `margin` and `top1_agreement`; differences are
    paired, with standard errors."""
    from buildsys.quant.metrics import perplexity, perplexity_difference

    row: dict[str, float] = {}
    if scores.windows:
        sums, counts = [w.nll for w in scores.windows], [w.predictions for w in scores.windows]
        change = perplexity_difference([w.nll for w in baseline.windows], sums, counts)
        row["ppl"] = perplexity(sums, counts).value
        row["ppl_increase"] = change.relative
        row["ppl_increase_error"] = change.relative_error
        row["top1_agreement"] = _mean(
            [
                float(a == b)
                for was, now in zip(baseline.windows, scores.windows, strict=True)
                for a, b in zip(was.likeliest, now.likeliest, strict=True)
            ]
            or [1.0]
        )
    if scores.answers:
        drops = [
            float(was.exact) - float(now.exact)
            for was, now in zip(baseline.answers, scores.answers, strict=True)
        ]
        row["exact_match"] = _mean([float(answer.exact) for answer in scores.answers])
        row["exact_match_drop"] = _mean(drops)
        row["exact_match_drop_error"] = _standard_error(drops)
        row["answer_logprob"] = _mean([answer.logprob for answer in scores.answers])
        row["margin"] = _mean([answer.margin for answer in scores.answers])
    return row


def agreement_figures(agreement: Agreement) -> dict[str, Any]:
    """KL to fp32, the SQNR (dB) behind every layer, and the layers that add most error."""
    return {
        "kl": agreement.kl,
        "layer_sqnr": [layer.sqnr for layer in agreement.layers],
        "worst_layers": [
            {"layer": layer.layer, "sqnr": layer.sqnr, "added": layer.added}
            for layer in agreement.worst()
        ],
    }


def rounded(value: Any) -> Any:
    """JSON values with floats at six significant digits and no finer than 1e-7, below which
    differences of sums are noise; what is not finite is null."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        # Adding zero turns -0.0 into 0.0.
        return round(float(f"{value:.6g}"), 7) + 0.0 if math.isfinite(value) else None
    return value


def _variants(step: StepContext) -> dict[str, Any]:
    paths = {}
    for given in step.inputs.get("variants", ()):
        if given.name in paths or given.name == BASELINE:
            raise StepError(f"{step.name}: two variants are called '{given.name}'")
        paths[given.name] = given.path
    return paths


def _open_samples(step: StepContext, model: Model, name: str) -> list[Sequence[Sample] | Any]:
    """The samples of every source of one input, kept in memory where they are small."""
    from buildsys.models.samples import open_samples

    opened = []
    for given in step.inputs.get(name, ()):
        samples = open_samples(model, given.kind, given.paths, given.options)
        opened.append(_kept(samples))
    return opened


def _kept(samples: Any) -> Any:
    """The samples as a list, unless their pixels take too much memory; then they are made anew
    each time. Questions about one image share its pixels."""
    kept: list[Sample] = []
    taken = 0
    last: Any = None
    for sample in samples:
        kept.append(sample)
        if sample.pixel_values is not None and sample.pixel_values is not last:
            last = sample.pixel_values
            taken += last.nbytes
        if taken > KEEP_BYTES:
            return samples
    return kept


def _module(
    step: StepContext, model: Model, variant: Variant | None, name: str, profile: str
) -> nn.Module:
    """The module that computes as the variant's runtime does."""
    from buildsys.models.runtime import load_module
    from buildsys.models.simulate import shadow_layers, simulate

    if variant is None:
        return load_module(model)
    module = load_module(model, variant.tensors)
    if variant.ranges:
        simulate(module, model.family, variant, profile, step.options["shadow"])
        layers = shadow_layers(model.family, variant.ranges)
        if layers:
            repaired = step.options["shadow"] == "flags"
            how = "are repaired on the CPU" if repaired else "saturate unrepaired"
            step.warn(f"{name}: figures hold where down_proj of the layers {layers} {how}")
            step.note(f"shadow_layers {name}", layers)
    return module


def _reference(module: nn.Module, texts: list[Any]) -> Reference:
    from buildsys.models.agreement import Reference

    return Reference(module, list(texts[0]))


def _score(
    module: nn.Module, texts: list[Any], questions: list[Any], progress: _Progress
) -> Scores:
    from buildsys.models.scoring import score_answers, score_text

    windows = [score for text in texts for score in score_text(module, text, progress.add)]
    answers = [score for part in questions for score in score_answers(module, part, progress.add)]
    return Scores(tuple(windows), tuple(answers))


class _Progress:
    """Counts tokens over all variants."""

    def __init__(
        self, step: StepContext, variants: int, texts: list[Any], questions: list[Any]
    ) -> None:
        self._step = step
        self._total = variants * sum(_tokens(part) for part in [*texts, *questions])
        self._done = 0

    def add(self, tokens: int) -> None:
        self._done += tokens
        self._step.progress(self._done, self._total, "tokens")


def _tokens(samples: Any) -> int:
    if isinstance(samples, list):
        return sum(sample.input_ids.shape[1] for sample in samples)
    return sum(length.tokens for length in samples.lengths())


def _default_profile(model: Model) -> str:
    return "mllm-v1-text" if model.config.vision is None else "mllm-v1-vl"


def _protocol(
    step: StepContext, profile: str, texts: list[Any], questions: list[Any]
) -> dict[str, Any]:
    """What the figures were taken on, and how."""
    return {
        "profile": profile,
        "shadow": step.options["shadow"],
        "text": [
            {"source": given.name, "windows": len(part), "tokens": _tokens(part)}
            for given, part in zip(step.inputs.get("text", ()), texts, strict=True)
        ],
        "questions": [
            {"source": given.name, "questions": len(part)}
            for given, part in zip(step.inputs.get("images", ()), questions, strict=True)
        ],
        "ppl": "windows do not overlap, no BOS, no prediction across a border",
        "top1_agreement": "share of predictions whose likeliest token is fp32's",
        "kl": "KL(fp32 || variant), nats, mean over 128 positions of the first windows of text",
        "layer_sqnr": "of the state behind each layer, dB: mean over the first 512 tokens of text "
        "of |error|^2 / |state|^2; `added`: how much of that ratio the layer adds",
        "exact_match": "greedy decoding gives the reference answer and its end of turn",
        "answer_logprob": "mean over questions of log p(answer), nats",
        "margin": "mean over questions of the smallest lead in logits of a reference token",
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; nan for one value."""
    count, mean = len(values), _mean(values)
    if count < 2:
        return math.nan
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
