"""Rule `rotation`: the matrices that turn a model's residual streams and heads, seeded.

One file binds everything downstream: scales, int8 weights and the decode model must be made with
the same matrices (mllm's own tool sets no seed, so that its file is the only link).
"""

from __future__ import annotations

from buildsys.rules.model_inputs import model_input
from buildsys.rules.spec import Rule, StepContext

RULE = Rule(
    name="rotation",
    doc="Random rotations R1 and R2 (and the vision tower's) as mllm's rotation.bin.",
    inputs={"model": model_input("config")},
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
    distributions=("torch", "numpy"),
    worker="python",
)


def make(step: StepContext) -> None:
    """Draw the matrices. Raises QuantError where the method has none of a size."""
    from buildsys.formats.rotation_file import save_rotation
    from buildsys.models.config import read_model_config
    from buildsys.models.open import describe
    from buildsys.models.rotations import make_rotations

    family = describe(read_model_config(step.one("model").path))
    rotation = make_rotations(
        family,
        method=step.options["method"],
        seed=step.options["seed"],
        vision=step.options["vision"],
        construction=step.options["construction"],
    )
    save_rotation(step.out, rotation)
    step.note("rotation", dict(rotation.metadata))
