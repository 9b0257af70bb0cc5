"""Rule `mllm-quantize`: a float checkpoint as a block-quantized .mllm of ggml's block types.

Which tensor gets which type is mllm's own rule for a `type`, or a config's patterns; bytes are
ggml's. From `model` and `rotation` the rotated tensors stream straight into the file, with no
float32 checkpoint in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.block_calibration import METHODS, Calibrated, calibrate
from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import MODEL_KINDS, RESCALE, ROTATION, digest_of, open_inputs
from buildsys.rules.spec import InputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.formats.mllm_types import MllmEntry
    from buildsys.formats.ordered_writer import HeaderAndPayloads
    from buildsys.formats.tensors import TensorSource
    from buildsys.plan.graph import Plan, Step
    from buildsys.quant.tensor_types import Target

# Of a config alone: a packing for a kernel of KleidiAI.
PACKED = "KAI "
MADE = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K")
# What mllm's tools take and qbuild does not make yet: refused by name.
LATER = ("KAI_Q4_0", "Q4_0_4_4", "Q8_K")
# One part of a tensor in float32: a quantizer needs several times as much beside it.
PART_BYTES = 1 << 22
FALLBACKS = ("Q8_0", "Q4_0", "F32")


def check(step: Step, plan: Plan) -> Iterable[Problem]:
    """One checkpoint or one model; one type or one config; no type of a later version."""
    kind, config = step.options.get("type"), step.inputs.get("config")
    if bool(kind) == bool(config):
        how = "both a type and a config" if kind else "neither a type nor a config"
        yield Problem(f"there is {how}", "Give option `type` or input `config`.", option="type")
    if kind in LATER:
        remedy = f"Types made here: {', '.join(MADE)}."
        yield Problem(f"type {kind} comes with a later version", remedy, option="type")
    if not step.inputs.get("checkpoint") and not step.inputs.get("model"):
        yield Problem("there is no `checkpoint` and no `model`", "Give one of them.")
    for name in ("rotation", "rescale"):
        if step.inputs.get("checkpoint") and step.inputs.get(name):
            remedy = f"Give `model` and `{name}`, or a checkpoint made with it."
            yield Problem(f"a checkpoint takes no {name} here", remedy, input=name)
    if step.options.get("calibration"):
        for name in ("model", "samples"):
            if not step.inputs.get(name):
                remedy = "The model is run on them, with the weights that are quantized."
                yield Problem(f"calibration needs `{name}`", remedy, option="calibration")
    yield from same_inputs(step, plan, "rotation", ["model"])
    yield from same_inputs(step, plan, "rescale", ["model", "rotation"])


RULE = Rule(
    name="mllm-quantize",
    doc="A block-quantized .mllm for mllm's CPU decoder.",
    inputs={
        "checkpoint": InputSpec(
            "Float weights: .safetensors, .pth, .bin, .mllm; a file, an index or a folder.",
            kinds=("artifact", "file", "folder", "model"),
            required=False,
            parts=("weights",),
        ),
        "model": InputSpec(
            "Instead of a checkpoint: the model itself. Beside a .mllm v1: its shapes.",
            kinds=MODEL_KINDS,
            required=False,
            parts=("config", "weights", "tokenizer", "processor"),
        ),
        "samples": InputSpec(
            "Text and images for `calibration`.",
            kinds=("text", "images"),
            many=True,
            required=False,
        ),
        "rotation": ROTATION,
        "rescale": RESCALE,
        "config": InputSpec("JSON of mllm's quantizer: patterns and their types.", required=False),
    },
    options={
        "type": {
            "enum": [None, *MADE, *LATER],
            "default": None,
            "description": "Type of the linears; embeddings become Q4_0, norms and biases stay "
            f"F32. {', '.join(LATER)} come with a later version.",
        },
        "fallback": {
            "enum": [None, *FALLBACKS],
            "default": None,
            "description": "Type of a tensor whose rows do not divide into blocks; without one "
            "that is an error. Every use is logged and noted.",
        },
        "calibration": {
            "enum": [None, *METHODS],
            "default": None,
            "description": "How linears of the language model are rounded, in the same format. "
            "gptq (Q4_0, Q4_K): levels make up for each other's errors on `samples`. imatrix "
            "(all but Q8_0): scales by the importance of each column, with ggml's bytes. gptq "
            "stays below the step's `memory`, or refuses before it starts.",
        },
        "version": {"enum": [1, 2], "default": 1, "description": "Version of the .mllm file."},
    },
    distributions=("torch", "numpy", "transformers", "tokenizers", "pillow"),
    worker="python",
    float_sums=True,
    resumable=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Quantize tensor by tensor. Raises QuantError or FormatError naming the tensor."""
    from buildsys.rules.activation_scales import states_folder

    source = _open(step)
    _check_floats(source)
    targets = _targets(step, source)
    _tell_fallbacks(step, targets)
    _check_version(step, targets)
    entries = [_entry(source, target) for target in targets]
    with states_folder(step) as folder:
        chosen = step.options["calibration"]
        made = calibrate(step, source, targets, folder) if chosen else Calibrated()
        with _writer(step, entries) as writer:
            for done, target in enumerate(targets):
                step.progress(done, len(targets), "tensors")
                _write(source, target, writer, made, step.threads)
    step.progress(len(targets), len(targets), "tensors")
    step.note("tensors", len(targets))
    step.note("types", dict(sorted(Counter(target.type for target in targets).items())))


def _open(step: StepContext) -> TensorSource:
    from buildsys.formats.checkpoint import open_checkpoint
    from buildsys.formats.tensors import RenamedSource
    from buildsys.models.config import read_model_config
    from buildsys.models.key_layout import to_classic
    from buildsys.models.open import describe
    from buildsys.models.rotated import rotated_tensors

    given, folder = step.maybe("checkpoint"), step.maybe("model")
    if given is None:
        model, rotations, rescale = open_inputs(step, exact=True)
        step.note("rotation", digest_of(step, "rotation"))
        return rotated_tensors(model, rotations, fuse=False, rescale=rescale)
    shapes = describe(read_model_config(folder.path)).shapes if folder is not None else None
    source = open_checkpoint(given.path, shapes)
    return RenamedSource(source, {to_classic(name): name for name in source.names()})


def _check_floats(source: TensorSource) -> None:
    for name in source.names():
        if not source.dtype(name).is_floating_point:
            raise StepError(
                f"{source.path.name}: tensor '{name}' is {source.stored_type(name)}, not float",
                remedy="Give float weights, such as rotated.safetensors: what is quantized "
                "already cannot be quantized again.",
            )


def _targets(step: StepContext, source: TensorSource) -> list[Target]:
    from buildsys.formats.mllm_quant_config import read_quant_config
    from buildsys.quant.tensor_types import Hint, targets_by_config, targets_by_type

    unknown = source.metadata.get("format") == "mllm v1" and step.maybe("model") is None
    shapes = {name: None if unknown else source.shape(name) for name in source.names()}
    fallback, config = step.options["fallback"], step.maybe("config")
    if config is None:
        if step.options["type"] not in MADE:
            raise StepError(f"{step.name}: type {step.options['type']} is not made here")
        return targets_by_type(shapes, step.options["type"], fallback)
    hints = [
        Hint(entry.pattern, entry.type, entry.replace, entry.rename, entry.shape)
        for entry in read_quant_config(config.path)
    ]
    return targets_by_config(shapes, hints, fallback)


def _tell_fallbacks(step: StepContext, targets: list[Target]) -> None:
    """Every use by name in the log and in the notes; one line for the person per kind of use."""
    used = [target for target in targets if target.instead_of is not None]
    groups: dict[str, list[str]] = {}
    for target in used:
        width = target.shape[-1] if target.shape else 1
        what = f"{target.type}, not {target.instead_of}: rows of {width} do not divide"
        groups.setdefault(what, []).append(target.name)
        step.log.warning("%s is %s", target.name, what)
    log = f"qbuild log {step.name}"
    for what, names in groups.items():
        step.warn(f"{len(names)} tensors are {what} (such as {names[0]}; all: {log})")
    step.note("fallback", {target.name: target.type for target in used})


def _check_version(step: StepContext, targets: list[Target]) -> None:
    packed = [target.name for target in targets if target.type.startswith(PACKED)]
    if packed and step.options["version"] == 1:
        raise StepError(
            f"{packed[0]}: version 1 of .mllm has no type for KleidiAI's packed weights",
            remedy="Set version: 2.",
        )


def _entry(source: TensorSource, target: Target) -> MllmEntry:
    import math

    from buildsys.formats.mllm_types import MllmType, block_entry, plain_entry
    from buildsys.quant.kleidiai import TILES, packed_size

    stored = source.shape(target.source)
    shape = target.shape or stored
    if math.prod(stored) != math.prod(shape):
        raise StepError(
            f"tensor '{target.source}' has {math.prod(stored)} values; the config's shape "
            f"{list(shape)} has {math.prod(shape)}"
        )
    if target.type == "F32":
        return plain_entry(target.name, MllmType.F32, shape)
    if target.type.startswith(PACKED):
        rows, width = shape
        size = packed_size(rows, width, TILES[target.type.removeprefix(PACKED)])
        return plain_entry(target.name, MllmType.BYTE, (size,))
    return block_entry(target.name, MllmType[target.type], shape)


def _writer(step: StepContext, entries: list[MllmEntry]) -> HeaderAndPayloads:
    from buildsys.formats.mllm_v1 import MllmV1Writer
    from buildsys.formats.mllm_v2 import MllmV2Writer

    if step.options["version"] == 1:
        return MllmV1Writer(step.out, entries)
    return MllmV2Writer(step.out, entries)


def _write(
    source: TensorSource,
    target: Target,
    writer: HeaderAndPayloads,
    calibrated: Calibrated,
    threads: int,
) -> None:
    """Stream one tensor through its quantizer, in runs of whole rows."""
    import torch

    from buildsys.quant.mllm_blocks import quantize

    if target.type.startswith(PACKED):
        _write_packed(source, target, writer)
        return
    first = 0
    for values in _rows(source, target):
        if target.type == "F32":
            writer.write_part(target.name, values)
        elif target.source in calibrated:
            blocks = calibrated.make(target.source, values.numpy(), first)
            writer.write_part(target.name, torch.from_numpy(blocks.reshape(-1)))
            first += len(values)
        else:
            blocks = quantize(values.numpy(), target.type, name=target.source, threads=threads)
            writer.write_part(target.name, torch.from_numpy(blocks.reshape(-1)))
    source.release(target.source)


def _write_packed(source: TensorSource, target: Target, writer: HeaderAndPayloads) -> None:
    """As `_write`, for KleidiAI: whole panels, with the linear's bias, which stays a tensor too."""
    import torch

    from buildsys.quant.kleidiai import TILES, pack

    tile = TILES[target.type.removeprefix(PACKED)]
    name = f"{target.source.removesuffix('.weight')}.bias"
    bias = source.read(name).to(torch.float32).numpy() if name in source.names() else None
    start = 0
    for values in _rows(source, target, tile.nr):
        part = None if bias is None else bias[start : start + len(values)]
        writer.write_part(target.name, torch.from_numpy(pack(values.numpy(), part, tile)))
        start += len(values)
    source.release(target.source)


def _rows(source: TensorSource, target: Target, panel: int = 1) -> Iterator[Tensor]:
    """The tensor as float32, in runs of rows [n, width], n a multiple of `panel` but for the
    last; finite or an error that names it."""
    import torch

    from buildsys.formats.checkpoint import check_finite
    from buildsys.formats.tensors import row_parts

    stored = source.shape(target.source)
    width = target.shape[-1] if target.shape else 1
    # Where the file stores no shape, a row is a run of numbers.
    unit = width if len(stored) < len(target.shape or stored) else 1
    unit *= panel
    rows = (-(-stored[0] // unit), unit, *stored[1:]) if stored else (1,)
    for start, stop in row_parts(rows, torch.float32.itemsize, PART_BYTES):
        if stored:
            part = source.rows(target.source, start * unit, min(stop * unit, stored[0]))
        else:
            part = source.read(target.source)
        values = part.to(torch.float32).reshape(-1, width)
        check_finite(target.source, values, file=source.path)
        yield values
