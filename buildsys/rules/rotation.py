"""Rule `rotation`: the matrices that turn a model's residual streams and heads, seeded or learned.

One file binds everything downstream: scales, int8 weights and the decode model must be made with
the same matrices (mllm's own tool sets no seed, so that its file is the only link).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.rules.model_inputs import MODEL_KINDS, model_input
from buildsys.rules.spec import InputSpec, Memory, Problem, Rule, StepContext

if TYPE_CHECKING:
    from buildsys.formats.rotation_file import Rotation
    from buildsys.models.family import Family
    from buildsys.models.open import Model
    from buildsys.models.samples import Samples
    from buildsys.plan.graph import Plan, Step

# Not tuned: docs/quality.md tells what one schedule does to SmolLM2.
RATE, BATCH = 0.02, 1


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """A choice among seeds, and learning, need something to choose by and to learn from."""
    wanted = {"seeds": step.options.get("seeds", 1) > 1, "learn": bool(step.options.get("learn"))}
    for option in (option for option, asked in wanted.items() if asked):
        for name, what in (("weights", "the model to judge"), ("samples", "text to judge by")):
            if not step.inputs.get(name):
                yield Problem(
                    f"{option} needs `{name}`: {what}",
                    remedy="Give inputs `weights` (the model again) and `samples`.",
                    option=option,
                )


RULE = Rule(
    name="rotation",
    doc="Rotations R1 and R2 (and the vision tower's), random or learned, as mllm's rotation.bin.",
    inputs={
        "model": model_input("config"),
        "weights": InputSpec(
            "The model again, for `seeds` and `learn`: only then the rotation depends on its "
            "weights.",
            kinds=MODEL_KINDS,
            required=False,
            parts=("config", "weights", "tokenizer", "processor"),
        ),
        "samples": InputSpec(
            "Text and images that `seeds` are judged by, and that `learn` learns from.",
            kinds=("text", "images"),
            many=True,
            required=False,
        ),
    },
    options={
        "method": {
            "enum": ["hadamard", "kronecker", "auto", "identity"],
            "default": "hadamard",
            "description": "hadamard: mllm's construction. kronecker: H_2^k (x) Q_odd, for sizes "
            "without a Hadamard matrix. auto: the first where it exists, else the second. "
            "identity: nothing turns, so that the folding of the norms can be had alone.",
        },
        "seed": {
            "type": "integer",
            "minimum": 0,
            "default": 0,
            "description": "What the random signs are drawn from: one seed, one file.",
        },
        "seeds": {
            "type": "integer",
            "minimum": 1,
            "default": 1,
            "description": "Draw so many rotations, from `seed` on, and keep the one under which "
            "plain static int8 loses least on `samples`. The losses are in the metadata.",
        },
        "learn": {
            "type": ["object", "null"],
            "properties": {
                "steps": {"type": "integer", "minimum": 1},
                "rate": {"type": "number", "exclusiveMinimum": 0},
                "batch": {"type": "integer", "minimum": 1},
                "weights": {"type": "boolean"},
            },
            "required": ["steps"],
            "additionalProperties": False,
            "default": None,
            "description": "Go on from the random rotation by so many Cayley steps (SpinQuant) "
            "down the KL to fp32 that static int8 costs on `samples`; slow. rate: radians that "
            f"the first step turns ({RATE}; falls to 0). batch: samples per step ({BATCH}). "
            "weights: they are rounded too while learning (true); false for rounding: gptq. The "
            "vision tower's matrices stay random.",
        },
        "target": {
            "enum": ["mllm-v1-text", "mllm-v1-vl", None],
            "default": None,
            "description": "The runtime's profile, for `seeds` and `learn`; by default mllm-v1-vl "
            "for models with a vision tower, else mllm-v1-text.",
        },
        "vision": {
            "type": "boolean",
            "default": True,
            "description": "Turn the vision tower too, where the model has one.",
        },
        "construction": {
            "enum": ["layernorm", "mllm"],
            "default": "layernorm",
            "description": "Of the vision tower's R. layernorm: keeps the vector of ones, so the "
            "same weights run under LayerNorm and RMSNorm. mllm: any R, RMSNorm only.",
        },
    },
    distributions=("torch", "numpy", "transformers", "tokenizers", "pillow"),
    worker="python",
    memory=Memory(largest=0.5, whole=6.0),  # learn's; without `weights` no tensor is read
    float_sums=True,
    resumable=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Draw the matrices. Raises QuantError where the method has none of a size."""
    from buildsys.formats.rotation_file import save_rotation
    from buildsys.models.config import read_model_config
    from buildsys.models.open import describe

    family = describe(read_model_config(step.one("model").path))
    seed = step.options["seed"]
    if step.options["seeds"] > 1:
        seed = _best_seed(step, family)
    rotation = _draw(step, family, seed)
    if step.options["learn"]:
        rotation = _learned(step, rotation, seed)
    save_rotation(step.out, rotation)
    step.note("rotation", dict(rotation.metadata))


def _draw(step: StepContext, family: Family, seed: int) -> Rotation:
    from buildsys.models.rotations import make_rotations

    return make_rotations(
        family,
        method=step.options["method"],
        seed=seed,
        vision=step.options["vision"],
        construction=step.options["construction"],
    )


def _judged_by(step: StepContext) -> tuple[Model, list[Samples], str]:
    """The model, the samples and the profile of `seeds` and `learn`. Raises ModelError naming a
    bad sample or tensor."""
    from buildsys.models.open import open_model
    from buildsys.models.samples import open_samples

    model = open_model(step.one("weights").path)
    given = step.inputs["samples"]
    samples = [open_samples(model, each.kind, each.paths, each.options) for each in given]
    seen = model.config.vision is not None
    return model, samples, step.options["target"] or ("mllm-v1-vl" if seen else "mllm-v1-text")


def _best_seed(step: StepContext, family: Family) -> int:
    """The seed with the least loss."""
    from buildsys.models.rotations import fit_rotations
    from buildsys.models.seed_choice import choose_seed, int8_loss

    model, samples, target = _judged_by(step)
    first = step.options["seed"]
    seed, losses = choose_seed(
        range(first, first + step.options["seeds"]),
        lambda seed: int8_loss(
            model, fit_rotations(_draw(step, family, seed), family), samples, target
        ),
        step.progress,
    )
    step.note("seeds", {str(each): loss for each, loss in losses.items()})
    return seed


def _learned(step: StepContext, start: Rotation, seed: int) -> Rotation:
    """What the random rotation becomes; it stays where learning makes it no better."""
    from buildsys.models.learned_rotation import Learning, learn_rotation

    model, samples, target = _judged_by(step)
    options = {"rate": RATE, "batch": BATCH, "weights": True, **step.options["learn"]}
    made = learn_rotation(
        model,
        start,
        samples,
        Learning(**options, target=target, seed=seed),
        folder=step.kept,
        progress=step.progress,
    )
    if made.after >= made.before:
        step.warn("the samples lose more under the learned rotation: the random one stays")
    step.note("learned", {"before": made.before, "after": made.after, "losses": list(made.losses)})
    return made.rotation
