"""The inputs that every rule over a model takes, and how a running step opens them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.rules.spec import ANY_FILE, DEVICES, InputSpec, ModelPart

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.models.computing import Compute
    from buildsys.models.open import Model
    from buildsys.models.rotations import Rotations
    from buildsys.rules.spec import StepContext

MODEL_KINDS = ("model", "artifact", "folder")
ROTATION = InputSpec(
    "A rotation.bin of rule rotation or of mllm's tools; without it nothing is turned.",
    kinds=ANY_FILE,
    required=False,
)
RESCALE = InputSpec(
    "Factors of rule rescale, applied after the rotation.", kinds=ANY_FILE, required=False
)

DEVICE = {
    "enum": list(DEVICES),
    "default": "cpu",
    "description": "Where the model runs. auto: cuda where torch has one, else cpu; what it came "
    "to is part of what the artifact is made from. cuda where there is none is an error.",
}
COMPUTE = {
    "enum": ["fp32", "bf16"],
    "default": "fp32",
    "description": "Precision of weights and hidden states while the model runs. bf16: half the "
    "memory, and fast where the processor or GPU has it; statistics are summed in float32.",
}


def model_input(*parts: ModelPart) -> InputSpec:
    """The input `model`: a model source, or an artifact that is a model folder."""
    return InputSpec("The model's folder: config, weights, tokenizer.", MODEL_KINDS, parts=parts)


def open_inputs(
    step: StepContext, *, exact: bool = False
) -> tuple[Model, Rotations | None, dict[str, Tensor]]:
    """The step's model, its rotation and its rescaling factors (empty without them).

    exact: without the factors of `gate-up`, for what is to compute as the model does.
    Raises ModelError or FormatError, naming tensor, matrix or field.
    """
    from buildsys.models.open import open_model
    from buildsys.models.rescaling import exact_factors, load_rescaling
    from buildsys.models.rotations import load_rotations

    model = open_model(step.one("model").path)
    rotation, rescale = step.maybe("rotation"), step.maybe("rescale")
    factors = {} if rescale is None else load_rescaling(rescale.path)
    return (
        model,
        None if rotation is None else load_rotations(rotation.path, model.family),
        exact_factors(factors, model.family) if exact else factors,
    )


def compute_of(step: StepContext) -> Compute:
    """Where the step's model runs, which is noted; ModelError where torch has no such device."""
    from buildsys.models.computing import open_compute

    compute = open_compute(step.options["device"], step.options.get("compute", "fp32"))
    step.note("device", compute.name())
    return compute


def digest_of(step: StepContext, name: str) -> str | None:
    """The content digest of an optional input; None where it is not given."""
    given = step.maybe(name)
    return None if given is None else given.digest
