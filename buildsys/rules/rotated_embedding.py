"""Rule `rotated-embedding`: the token embedding turned by the rotation that an mxq holds.

Mobilint's client looks tokens up on the host, and the mxq expects them turned: E R, float64
product, stored as float32, alone in a safetensors file (the vendor's get_safetensors.py). The
rotation must be the mxq's own; a file of qbuild's or mllm's is accepted for tests and other
runtimes.
"""

from __future__ import annotations

from buildsys.errors import StepError
from buildsys.rules.spec import ANY_FILE, InputSpec, Rule, StepContext

RULE = Rule(
    name="rotated-embedding",
    doc="The token embedding turned by a rotation, as a safetensors file of one float32 tensor.",
    inputs={
        "model": InputSpec(
            "The model whose embedding it is.",
            kinds=("model", "artifact", "folder"),
            parts=("config", "weights"),
        ),
        "rotation": InputSpec(
            "global_rotation.pth of the mxq (TorchScript), or a rotation.bin.", kinds=ANY_FILE
        ),
    },
    options={
        "embedding_key": {
            "enum": ["model.embed_tokens.weight", "model.language_model.embed_tokens.weight"],
            "default": "model.language_model.embed_tokens.weight",
            "description": "Name of the tensor. The client finds the default under transformers 4 "
            "and 5. The vendor's script writes the other, which the client under transformers 5 "
            "does not find: it then answers from a random embedding, and says nothing.",
        }
    },
    distributions=("torch",),
    worker="python",
    float_sums=True,
)


def make(step: StepContext) -> None:
    """Write E R. Raises StepError for a rotation of another size."""
    import torch

    from buildsys.formats.rotation_file import load_rotation
    from buildsys.formats.safetensors_file import SafetensorsWriter
    from buildsys.formats.tensors import TensorEntry, row_parts
    from buildsys.models.open import open_model
    from buildsys.quant.recover import recover
    from buildsys.quant.rotation import rotate_input

    model = open_model(step.one("model").path)
    given = step.one("rotation")
    table = model.family.embedding
    file = load_rotation(given.path)
    if len(file.R) != table.columns:
        raise StepError(
            f"{given.path.name}: R is {len(file.R)} x {len(file.R)}, "
            f"the embedding has {table.columns} columns",
            remedy="The rotation is of another model: give the one that the mxq was made with.",
        )
    R = recover(file.R, "R")
    name = step.options["embedding_key"]
    entry = TensorEntry(name, torch.float32, (table.rows, table.columns))
    metadata = {"format": "pt", "rotation": given.digest}
    with SafetensorsWriter(step.out, [entry], metadata) as writer:
        for start, stop in row_parts(entry.shape, torch.float64.itemsize):
            step.progress(start, table.rows, "rows")
            part = model.tensors.rows(table.weight_name, start, stop)
            out = torch.empty(part.shape, dtype=torch.float32)
            writer.write_part(name, rotate_input(part, R, out=out))
    step.progress(table.rows, table.rows, "rows")
    step.note("rotation", {"digest": given.digest, "format": file.format, "size": len(file.R)})
