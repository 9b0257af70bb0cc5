"""Rule `rotated-checkpoint`: the whole model after rotation, in float.

What mllm's CPU decodes with (after conversion and 4-bit quantization): it must be made with the
rotation of the int8 model, because the two share embeddings and the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import RESCALE, ROTATION, digest_of, model_input, open_inputs
from buildsys.rules.spec import Problem, Rule, StepContext

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from buildsys.formats.ordered_writer import OrderedWriter
    from buildsys.formats.tensors import TensorEntry
    from buildsys.plan.graph import Plan, Step

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """A known kind of file, and a rotation and factors of this model."""
    if not step.name.endswith((".safetensors", *TORCH_SUFFIXES)):
        yield Problem(
            f"{step.name} is neither .safetensors nor .pth",
            remedy="The artifact's name says which kind of file is written.",
        )
    yield from same_inputs(step, plan, "rotation", ["model"])
    yield from same_inputs(step, plan, "rescale", ["model", "rotation"])


RULE = Rule(
    name="rotated-checkpoint",
    doc="The model after norm fusion, rotation and rescaling, in float; lm_head always apart.",
    inputs={
        "model": model_input("config", "weights"),
        "rotation": ROTATION,
        "rescale": RESCALE,
    },
    options={
        "dtype": {
            "enum": ["float32", "bfloat16", "float16"],
            "default": "float32",
            "description": "float32 is what mllm writes; 16 bits cost accuracy after rotation.",
        }
    },
    distributions=("torch",),
    worker="python",
    check=check,
)


def make(step: StepContext) -> None:
    """Stream every tensor through. Raises ModelError or FormatError, naming the tensor."""
    import torch

    from buildsys.formats.tensors import copy_tensor, entries_of
    from buildsys.models.rotated import rotated_tensors

    model, rotations, rescale = open_inputs(step, exact=True)
    dtype = getattr(torch, step.options["dtype"])
    tensors = rotated_tensors(model, rotations, rescale=rescale, dtype=dtype)
    names = tensors.names()
    metadata = {"format": "pt", "qbuild.rotation": digest_of(step, "rotation") or "none"}
    if (factors := digest_of(step, "rescale")) is not None:
        metadata["qbuild.rescale"] = factors
    with _writer(step.out, entries_of(tensors), metadata) as writer:
        for done, name in enumerate(names):
            step.progress(done, len(names), "tensors")
            copy_tensor(tensors, name, writer)
    step.progress(len(names), len(names), "tensors")


def _writer(path: Path, entries: Sequence[TensorEntry], metadata: dict[str, str]) -> OrderedWriter:
    from buildsys.formats.safetensors_file import SafetensorsWriter
    from buildsys.formats.torch_archive import StateDictWriter

    if path.suffix in TORCH_SUFFIXES:
        return StateDictWriter(path, entries)
    return SafetensorsWriter(path, entries, metadata)
