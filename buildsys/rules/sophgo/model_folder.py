"""A model as TPU-MLIR's converter reads one: classic layout, safetensors, and a config whose
dtype is that of the arithmetic.

The converter goes by config.json alone: it would take the weights of another type for what the
config says, and of a transformers-5 layout it finds half. So the folder is made anew; what lies
right already is linked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.config_file import ConfigFile, read_config
from buildsys.formats.safetensors_file import SafetensorsSource, SafetensorsWriter
from buildsys.formats.tensors import JoinedSource, RenamedSource, copy_tensor, entries_of
from buildsys.models.key_layout import to_classic

if TYPE_CHECKING:
    from collections.abc import Callable

    from buildsys.formats.tensors import TensorSource

# The files of a model that are no weights: what a board needs beside the bmodel.
OTHERS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FLAT_TYPES = ("qwen2_vl", "qwen2_5_vl")
# The families whose tensors transformers 5 has given other names.
RENAMED_TYPES = ("qwen2", *FLAT_TYPES)
WIDTHS = ("hidden_size", "intermediate_size")
VISION_HEAD = 80  # features; the converter has it built in
VISION_DEFAULTS = {
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


@dataclass(frozen=True)
class Prepared:
    """The folder, and what was found. widths: of the rows of the language model's linears, by
    their names in config.json; stored: the type of the weights; rewritten: were they copied, rather
    than linked."""

    folder: Path
    model_type: str
    has_vision: bool
    widths: Mapping[str, int]
    stored: str
    quantization: str | None
    rewritten: bool


def prepare(
    model: Path,
    checkpoint: Path | None,
    quantize: str,
    folder: Path,
    progress: Callable[[float, float, str], None],
) -> Prepared:
    """Lay `model` out in `folder`, with the weights of `checkpoint` where one is given.

    Raises StepError for a model that cannot be compiled this way, FormatError for damaged files.
    """
    config = read_config(model)
    source = open_checkpoint(model if checkpoint is None else checkpoint)
    is_renamed = config.text("model_type") in RENAMED_TYPES
    names = {to_classic(name) if is_renamed else name: name for name in source.names()}
    method = quantization_of(config)
    stored = _stored_type(source)
    arithmetic = arithmetic_of(config, quantize, method, stored)
    tied = "lm_head.weight" not in names
    if tied and method is None:
        _check_tied(config, source.path)
    classic = classic_config(config, arithmetic, tied)
    _check_vision(config, classic, names)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(classic, indent=2) + "\n", encoding="utf-8")
    for name in OTHERS:
        if (model / name).is_file():
            (folder / name).symlink_to((model / name).resolve())
    files = None if any(new != old for new, old in names.items()) else safetensors_files(source)
    if files is None:
        _rewrite(RenamedSource(source, names), folder / "model.safetensors", progress)
    else:
        for number, path in enumerate(files):
            (folder / f"model-{number:05d}.safetensors").symlink_to(path.resolve())
    return Prepared(
        folder=folder,
        model_type=config.text("model_type"),
        has_vision="vision_config" in classic,
        widths={name: classic[name] for name in WIDTHS if isinstance(classic.get(name), int)},
        stored=stored,
        quantization=method,
        rewritten=files is None,
    )


def _check_tied(config: ConfigFile, weights: Path) -> None:
    """A model without a head of its own says so, at the top or within."""
    nested = config.fields.get("text_config")
    told = [config.fields, nested] if isinstance(nested, dict) else [config.fields]
    if not any(each.get("tie_word_embeddings") for each in told):
        raise StepError(
            f"{weights}: tensor 'lm_head.weight' is missing, and config.json ties it to nothing",
            remedy="The download may be incomplete.",
        )


def quantization_of(config: ConfigFile) -> str | None:
    """ "awq", "gptq" or another method by which the checkpoint is quantized; None for floats."""
    given = config.fields.get("quantization_config")
    return str(given.get("quant_method")) if isinstance(given, dict) else None


def arithmetic_of(config: ConfigFile, quantize: str, method: str | None, stored: str) -> str:
    """The 16-bit type in which the model computes: "bfloat16" or "float16".

    Raises StepError where the mode and the checkpoint do not go together.
    """
    if method is not None:
        return _of_quantized(config, quantize, method)
    if quantize == "auto":
        near = "w4f16" if stored == "float16" else "w4bf16"
        raise StepError(
            f"{config.path}: `quantize: auto` is for AWQ and GPTQ checkpoints; this is {stored}",
            remedy=f"Say how it shall be quantized: `quantize: {near}`, for example.",
        )
    wanted = "bfloat16" if "bf16" in quantize else "float16"
    if stored not in ("float32", wanted):
        other = (
            quantize.replace("bf16", "f16")
            if "bf16" in quantize
            else quantize.replace("f16", "bf16")
        )
        raise StepError(
            f"quantize {quantize} computes in {wanted}, and the checkpoint is stored in {stored}",
            remedy=f"Give `quantize: {other}`. (float32 may become either.)",
        )
    return wanted


def _of_quantized(config: ConfigFile, quantize: str, method: str) -> str:
    """A quantized checkpoint fixes the mode: anything else would be overruled in silence."""
    if method not in ("awq", "gptq"):
        return "bfloat16"  # the compiler says what it makes of it
    section = config.section("quantization_config")
    bits = section.integer("bits")
    declared = str(config.fields.get("torch_dtype") or config.fields.get("dtype") or "float16")
    arithmetic = "float16" if method == "awq" else declared
    own = f"w{bits}{'bf16' if arithmetic == 'bfloat16' else 'f16'}"
    if quantize not in ("auto", own):
        raise StepError(
            f"{config.path}: a {method.upper()} checkpoint of {bits} bits compiles as {own}, "
            f"not as {quantize}",
            remedy="Give `quantize: auto`.",
        )
    return arithmetic


def _stored_type(source: TensorSource) -> str:
    """The type of the checkpoint's floats; float32 beside a 16-bit type does not count."""
    kinds = {FLOATS[kind] for kind in map(source.stored_type, source.names()) if kind in FLOATS}
    kinds |= {
        str(source.dtype(name)).removeprefix("torch.")
        for name in source.names()
        if source.stored_type(name) not in FLOATS and source.dtype(name).is_floating_point
    }
    half = sorted(kinds - {"float32"})
    if len(half) > 1:
        raise StepError(f"{source.path}: the weights are of several types: {', '.join(half)}")
    return half[0] if half else "float32"


def classic_config(config: ConfigFile, arithmetic: str, tied: bool) -> dict[str, Any]:
    """config.json as the hub's checkpoints have it: of Qwen's vision models with the fields of
    the text at the top, of others as it is; with the type in which the model computes."""
    raw = dict(config.fields)
    nested = raw.get("text_config")
    if isinstance(nested, dict) and raw.get("model_type") in FLAT_TYPES:
        del raw["text_config"]
        raw = {**nested, **raw}
    elif isinstance(nested, dict):
        raw["text_config"] = {**nested, "torch_dtype": arithmetic, "dtype": arithmetic}
    raw.pop("dtype", None)
    raw["torch_dtype"] = arithmetic
    if tied != raw.get("tie_word_embeddings", False):
        raw["tie_word_embeddings"] = tied
    rope = raw.get("rope_parameters")
    if isinstance(rope, dict):
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        if "mrope_section" in rope:
            del raw["rope_parameters"]
            raw["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = raw.get("vision_config")
    if isinstance(vision, dict) and raw.get("model_type") in FLAT_TYPES:
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        raw["vision_config"] = {**VISION_DEFAULTS, **vision, "in_chans": channels}
    return raw


def _check_vision(config: ConfigFile, classic: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """What the converter takes for granted of a Qwen2-VL's vision tower."""
    if classic["model_type"] != "qwen2_vl":
        return
    vision = config.section("vision_config")
    width, heads = vision.integer("embed_dim"), vision.integer("num_heads")
    if width != heads * VISION_HEAD:
        raise StepError(
            f"{config.path}: vision heads have {width / heads:g} features; TPU-MLIR takes "
            f"{VISION_HEAD} for granted",
            remedy=f"embed_dim must be {VISION_HEAD} times num_heads, as in all of Qwen's models.",
        )
    if "visual.blocks.0.norm1.bias" not in names:
        raise StepError(
            "the checkpoint's vision tower has norms without bias: it was turned for a runtime "
            "with RMSNorm, and TPU-MLIR computes LayerNorm",
            remedy="Make the rotation with `construction: layernorm`, rule rotation's default.",
        )


def safetensors_files(source: TensorSource) -> Sequence[Path] | None:
    """The files that hold the checkpoint, if all are safetensors."""
    parts = source.parts() if isinstance(source, JoinedSource) else [source]
    if all(isinstance(part, SafetensorsSource) for part in parts):
        return [part.path for part in parts]
    return None


def _rewrite(
    source: TensorSource, target: Path, progress: Callable[[float, float, str], None]
) -> None:
    names = source.names()
    with SafetensorsWriter(target, entries_of(source), {"format": "pt"}) as writer:
        for done, name in enumerate(names):
            progress(done, len(names), "tensors")
            copy_tensor(source, name, writer)
