"""Rule `activation-scales`: static ranges of what every linear reads and writes.

Text and images together: the language model sees merged vision tokens, and the vision tower
gets ranges of its own. All samples go through one layer at a time, which alone is in memory;
a killed run goes on behind the last finished layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import (
    COMPUTE,
    DEVICE,
    RESCALE,
    ROTATION,
    compute_of,
    digest_of,
    model_input,
    open_inputs,
)
from buildsys.rules.spec import InputSpec, Memory, Problem, Rule, StepContext

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.formats.tensors import TensorSource
    from buildsys.models.clipped import Clipped
    from buildsys.models.computing import Compute
    from buildsys.models.graph.profile import GraphProfile
    from buildsys.models.open import Model
    from buildsys.models.profile import LinearStatistics
    from buildsys.models.rotations import Rotations
    from buildsys.models.samples import Samples
    from buildsys.plan.graph import Plan, Step


METHODS = ("absmax", "mse", "kl", "relative")
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """The rotation and the factors must be this model's."""
    yield from same_inputs(step, plan, "rotation", ["model"])
    yield from same_inputs(step, plan, "rescale", ["model", "rotation"])
    elsewhere = step.options.get("device") == "cuda" or step.options.get("compute") == "bf16"
    if elsewhere and step.options.get("points") == "graph":
        yield Problem(
            "points: graph takes its ranges in fp32 on the CPU",
            remedy="Leave device and compute out, or points.",
            option="points",
        )


RULE = Rule(
    name="activation-scales",
    doc="Activation ranges of every linear, in mllm's JSON.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "rotation": ROTATION,
        "rescale": RESCALE,
        "samples": InputSpec(
            "Text and images that are run through the model.", kinds=("text", "images"), many=True
        ),
    },
    options={
        "statistics": {
            "enum": ["absmax", "mllm"],
            "default": "absmax",
            "description": "absmax: of |x|. mllm: of the signed values, as mllm's tool takes them "
            "(a tensor whose negative side is larger gets too small a range).",
        },
        "clipping": {
            "anyOf": [
                {"enum": list(METHODS)},
                {
                    "type": "object",
                    "additionalProperties": {"enum": list(METHODS)},
                    "propertyNames": {"enum": list(KINDS)},
                },
            ],
            "default": "absmax",
            "description": "Where 8-bit inputs and outputs of the language model saturate, one "
            f"method for all or by kind of linear ({', '.join(KINDS)}). absmax: nowhere. mse: "
            "least squared error. kl: least relative entropy of histograms. relative: least error "
            "in what the layer writes, relative to the residual stream. Takes a second pass.",
        },
        "target": {
            "enum": ["mllm-v1-text", "mllm-v1-vl", None],
            "default": None,
            "description": "The runtime's profile, which says what has 8 bits, for `clipping`; by "
            "default mllm-v1-vl for models with a vision tower, else mllm-v1-text.",
        },
        "points": {
            "enum": ["linears", "graph"],
            "default": "linears",
            "description": "graph: also the range (min, max) of every tensor of the model's "
            "graphs, which rule qnn-context needs; mllm's three sections stay as they are.",
        },
        "device": DEVICE,
        "compute": COMPUTE,
        "no_bias": {
            "type": "boolean",
            "default": True,
            "description": "Take outputs before the bias, where the runtime adds it in float; "
            "false only for int8 checkpoints with quant_bias.",
        },
    },
    distributions=("torch", "transformers", "tokenizers", "pillow"),
    worker="python",
    memory=Memory(largest=1.5),
    threads=2,
    float_sums=True,
    resumable=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Profile. Raises ModelError naming a bad sample, QuantError where activations overflow."""
    from buildsys.models.profile_layers import profile_layers
    from buildsys.models.rotated import rotated_tensors
    from buildsys.models.scales import write_scales

    compute = compute_of(step)
    model, rotations, rescale = open_inputs(step)
    tensors = rotated_tensors(model, rotations, rescale=rescale)
    samples = open_step_samples(step, model)
    graphs = _graphs(model, rotations, rescale) if step.options["points"] == "graph" else None
    with states_folder(step) as folder:
        statistics = profile_layers(
            model,
            tensors,
            samples,
            folder,
            mode=step.options["statistics"],
            no_bias=step.options["no_bias"],
            graphs=graphs,
            compute=compute,
            progress=step.progress,
        )
    unseen = [
        linear.name
        for linear in model.family.linears.values()
        if linear.observed and linear.name not in statistics
    ]
    if unseen:
        step.warn(f"{len(unseen)} linears saw no sample and have no scale, such as {unseen[0]}")
    ranges = None if graphs is None else graphs.ranges
    clipped = _clipped(step, model, tensors, samples, statistics, compute)
    target = target_of(step, model) if clipped else None
    write_scales(step.out, statistics, made_with(step, samples, target), ranges, clipped)


def _clipped(
    step: StepContext,
    model: Model,
    tensors: TensorSource,
    samples: list[Samples],
    statistics: Mapping[str, LinearStatistics],
    compute: Compute,
) -> dict[str, Clipped]:
    """Ranges below the maximum, where the recipe asks for them."""
    from buildsys.models.clipped import clipped_ranges

    given: Any = step.options["clipping"]
    methods: dict[Any, Any] = dict.fromkeys(KINDS, given) if isinstance(given, str) else given
    if set(methods.values()) <= {"absmax"}:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        found = clipped_ranges(
            model,
            tensors,
            samples,
            Path(folder),
            statistics=statistics,
            methods=methods,
            target=target_of(step, model),
            compute=compute,
            progress=step.progress,
        )
    step.note("clipped", len(found))
    return found


def target_of(step: StepContext, model: Model) -> str:
    """The numeric profile of the language model."""
    by_default = "mllm-v1-text" if model.config.vision is None else "mllm-v1-vl"
    return str(step.options["target"] or by_default)


def _graphs(
    model: Model, rotations: Rotations | None, rescale: Mapping[str, Tensor]
) -> GraphProfile:
    """Takes the ranges of the graphs' tensors; the graphs have every norm folded."""
    from buildsys.models.graph.profile import GraphProfile
    from buildsys.models.rotated import rotated_tensors

    return GraphProfile(model, rotated_tensors(model, rotations, fold_all=True, rescale=rescale))


@contextmanager
def states_folder(step: StepContext) -> Iterator[Path]:
    """Where hidden states and what is made of them lie: over a kill, where the engine can."""
    if step.kept is not None:
        yield step.kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def open_step_samples(step: StepContext, model: Model) -> list[Samples]:
    """Every source of input `samples`, opened for the model."""
    from buildsys.models.samples import open_samples

    return [
        open_samples(model, given.kind, given.paths, given.options)
        for given in step.inputs["samples"]
    ]


def made_with(
    step: StepContext, samples: list[Samples], target: str | None = None
) -> dict[str, Any]:
    """The "qbuild" section: what the scales must be used with, and what they were taken on.
    target: the profile that ranges were clipped for, where they were."""
    return {
        "statistics": step.options["statistics"],
        "no_bias": step.options["no_bias"],
        "device": step.options["device"],
        "compute": step.options["compute"],
        **({} if target is None else {"clipping": step.options["clipping"], "target": target}),
        "model": digest_of(step, "model"),
        "rotation": digest_of(step, "rotation"),
        "rescale": digest_of(step, "rescale"),
        "samples": [
            {"source": given.name, "digest": given.digest, "count": len(part)}
            for given, part in zip(step.inputs["samples"], samples, strict=True)
        ],
    }
