"""Rule `mllm-file`: any checkpoint as a .mllm file of version 1 or 2, tensor by tensor.

Dtypes go as mllm's converters take them (v1: floats become F32, bool I8; v2: kept), except
that int32 stays int32: mllm's v1 converter writes an int32 bias as float32, which its runtime
then reads as integers.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.spec import InputSpec, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.formats.tensors import TensorSource

RULE = Rule(
    name="mllm-file",
    doc="A checkpoint as a .mllm file, for mllm v1 or v2.",
    inputs={
        "checkpoint": InputSpec(
            ".safetensors, .pth, .bin, .mllm or .gguf; a file, an index or a folder.",
            kinds=("artifact", "file", "folder", "model"),
            parts=("weights",),
        ),
        "model": InputSpec(
            "The model that the checkpoint is of: gives the shapes that a .mllm v1 lacks.",
            kinds=("model", "artifact", "folder"),
            required=False,
            parts=("config",),
        ),
    },
    options={
        "version": {
            "enum": [1, 2],
            "default": 1,
            "description": "1: ModelFileV1, for mllm v1. 2: ModelFileV2, which stores shapes.",
        }
    },
    distributions=("torch",),
    worker="python",
)


def make(step: StepContext) -> None:
    """Convert. Raises FormatError, naming the tensor, for what the version cannot hold."""
    from buildsys.formats.mllm_source import conversion, mllm_entries
    from buildsys.formats.mllm_v1 import TYPES as TYPES_V1
    from buildsys.formats.mllm_v1 import MllmV1Writer
    from buildsys.formats.mllm_v2 import TYPES as TYPES_V2
    from buildsys.formats.mllm_v2 import MllmV2Writer
    from buildsys.formats.tensors import copy_tensor

    source = _open(step)
    version = step.options["version"]
    entries = mllm_entries(source, TYPES_V1 if version == 1 else TYPES_V2, version)
    writer = (MllmV1Writer if version == 1 else MllmV2Writer)(step.out, entries)
    with writer:
        for done, entry in enumerate(entries):
            step.progress(done, len(entries), "tensors")
            convert = conversion(source, entry.name, entry)
            copy_tensor(source, entry.name, writer, convert=convert)
    step.progress(len(entries), len(entries), "tensors")
    step.note("tensors", len(entries))
    step.note("types", dict(sorted(Counter(entry.type.name for entry in entries).items())))
    _note_narrowed(step, source, {entry.name: entry.type.name for entry in entries})


def _open(step: StepContext) -> TensorSource:
    from buildsys.formats.checkpoint import open_checkpoint

    path = step.one("checkpoint").path
    model = step.maybe("model")
    source = _classic(open_checkpoint(path))
    if source.metadata.get("format") != "mllm v1" or step.options["version"] == 1:
        return source
    if model is None:
        raise StepError(
            f"{path.name} is a .mllm v1, which has no shapes, and version 2 needs them",
            remedy="Give the model that it is of as input `model`.",
        )
    return open_checkpoint(path, _shapes(source, model.path))


def _classic(source: TensorSource) -> TensorSource:
    """The source under the classic names, which mllm's runtime knows."""
    from buildsys.formats.tensors import RenamedSource
    from buildsys.models.key_layout import to_classic

    names = {to_classic(name): name for name in source.names()}
    return source if all(new == old for new, old in names.items()) else RenamedSource(source, names)


def _shapes(source: TensorSource, model: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of what mllm's export writes: int8 weights lie [in, out], scales are 0-d."""
    import torch

    from buildsys.models.config import read_model_config
    from buildsys.models.open import describe

    known = describe(read_model_config(model)).shapes
    shapes: dict[str, tuple[int, ...]] = {}
    for name in source.names():
        if name in known:
            transposed = source.dtype(name) == torch.int8
            shapes[name] = known[name][::-1] if transposed else known[name]
        elif source.shape(name) == (1,):
            shapes[name] = ()
        else:
            raise StepError(
                f"{source.path.name}: the model has no tensor '{name}', so its shape is unknown",
                remedy="Is the file of another model?",
            )
    return shapes


def _note_narrowed(step: StepContext, source: TensorSource, types: dict[str, str]) -> None:
    """float64 loses digits in float32, the widest float of .mllm."""
    narrowed = [name for name in types if source.stored_type(name) in ("F64", "float64")]
    if narrowed:
        step.note("narrowed", narrowed)
        step.warn(f"{len(narrowed)} float64 tensors became float32, such as {narrowed[0]}")
