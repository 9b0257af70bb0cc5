"""Reads the JSON that tells mllm's quantizer what to do: the form of v2, and the one before it.

v2: `{REGEX: {"hints": {"quant_method": "gguf", "gguf_type": "Q4_K", ...}}}`.
Before: `{"ModelName": ..., "Ops": {LAYER: {"type": "Linear", "implType": "Q4_K"}}}`, which
mllm's present tool refuses with a JSON type error; it is translated.
Source: mllm v2, tools/mllm-quantizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from buildsys.formats.config_file import ConfigFile, read_json
from buildsys.formats.errors import FormatError

GGUF_TYPES = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K")
LATER_TYPES = ("Q8_K",)
# A type that stands for a packing: this, and the name of KleidiAI's kernel.
KAI = "KAI "
KAI_TRIPLET, KAI_LAYOUT = "f32_qai8dxp_qsi4c32p", "mxk_nxk"
# The kernels that take that, by mllm's names; the first is the default.
KAI_TILES = (
    "qai8dxp1x8_qsi4c32p4x8_1x4x32",
    "qai8dxp1x8_qsi4c32p8x8_1x8x32",
    "qai8dxp4x8_qsi4c32p4x8_8x4x32",
    "qai8dxp4x8_qsi4c32p4x8_16x4x32",
    "qai8dxp4x8_qsi4c32p8x8_4x8x32",
    "qai8dxp1x4_qsi4c32p4x4_1x4",
)
HINTS = frozenset({"quant_method", "gguf_type", "replace", "rename", "shape"})
KAI_HINTS = frozenset({"kai_matmul_triplet", "kai_matmul_layout", "kai_matmul_tile_cfg"})
LATER = "comes with a later version"
KEPT = ("Default", "FP32", "F32")  # implTypes that leave a layer in float


@dataclass(frozen=True)
class QuantEntry:
    """Tensors whose whole name matches `pattern` are quantized as `type` (of ggml's, or "KAI "
    and the kernel that they are packed for); see mllm's hints."""

    pattern: str
    type: str
    replace: bool
    rename: str | None
    shape: tuple[int, ...] | None


def read_quant_config(path: str | PathLike[str]) -> list[QuantEntry]:
    """The entries of a config of either form, sorted by pattern.

    Raises FormatError, naming the entry, for what the form does not have, for types
    that a later version makes and for regular expressions that do not compile.
    """
    file = Path(path)
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise FormatError("is not an object with entries", file=file)
    config = ConfigFile(file, content)
    entries = _from_ops(config) if "Ops" in content else _from_patterns(config)
    if not entries:
        raise FormatError("quantizes nothing", file=file, remedy="Name at least one tensor.")
    return sorted(entries, key=lambda entry: entry.pattern)


def _from_patterns(config: ConfigFile) -> list[QuantEntry]:
    return [_entry(config, pattern) for pattern in config.fields]


def _entry(config: ConfigFile, pattern: str) -> QuantEntry:
    hints = config.section(pattern).section("hints")
    _check_hints(hints)
    try:
        re.compile(pattern)
    except re.error as error:
        raise config.wrong(pattern, f"is no regular expression: {error}") from error
    replace = hints.flag("replace") if hints.has("replace") else True
    rename = hints.text("rename") if hints.has("rename") else None
    if not replace and rename is None:
        raise hints.wrong("rename", "is needed where `replace` is false: the original stays")
    kai = hints.text("quant_method") == "kai"
    kind = _kai_type(hints) if kai else _gguf_type(hints, "gguf_type")
    return QuantEntry(pattern, kind, replace, rename, _shape(hints))


def _check_hints(hints: ConfigFile) -> None:
    method = hints.text("quant_method")
    if method not in ("gguf", "kai"):
        raise hints.wrong("quant_method", f"is {method!r}, neither 'gguf' nor 'kai'")
    unknown = sorted(set(hints.fields) - HINTS - KAI_HINTS)
    if unknown:
        raise hints.wrong(unknown[0], "is no hint", f"Hints: {', '.join(sorted(HINTS))}.")


def _kai_type(hints: ConfigFile) -> str:
    """What mllm's own tool passes over with a warning (another triplet or layout) is an error."""
    known = {"kai_matmul_triplet": KAI_TRIPLET, "kai_matmul_layout": KAI_LAYOUT}
    for field, only in known.items():
        if hints.has(field) and hints.text(field) != only:
            raise hints.wrong(field, f"is {hints.text(field)!r}; {only} can be made")
    tile = hints.text("kai_matmul_tile_cfg", KAI_TILES[0])
    if tile not in KAI_TILES:
        raise hints.wrong("kai_matmul_tile_cfg", f"is {tile!r}", f"Known: {', '.join(KAI_TILES)}.")
    return KAI + tile


def _shape(hints: ConfigFile) -> tuple[int, ...] | None:
    value = hints.fields.get("shape")
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise hints.wrong("shape", f"is {value!r}, not [out_features, in_features]")
    return tuple(sizes)


def _gguf_type(section: ConfigFile, field: str) -> str:
    name = section.text(field).upper().removeprefix("GGUF_")
    remedy = f"Types made here: {', '.join(GGUF_TYPES)}."
    if name in LATER_TYPES or name.startswith(("KAI", "KLEIDI")):
        raise section.wrong(field, f"is {section.text(field)!r}, which {LATER}", remedy)
    if name not in GGUF_TYPES:
        raise section.wrong(field, f"is {section.text(field)!r}, which is no type", remedy)
    return name


def _from_ops(config: ConfigFile) -> list[QuantEntry]:
    ops = config.section("Ops")
    entries = []
    for layer in ops.fields:
        op = ops.section(layer)
        _check_op(op)
        if op.text("implType") not in KEPT:
            entries.append(_translated(layer, _gguf_type(op, "implType")))
    return entries


def _check_op(op: ConfigFile) -> None:
    kinds = ("Linear", "Embedding")
    if op.has("type") and op.text("type") not in kinds:
        raise op.wrong("type", f"is {op.text('type')!r}, not one of {', '.join(kinds)}")


def _translated(layer: str, type_name: str) -> QuantEntry:
    """A layer's name is not an expression: its weight and nothing else."""
    name = layer if layer.endswith(".weight") else f"{layer}.weight"
    return QuantEntry(re.escape(name), type_name, True, None, None)
