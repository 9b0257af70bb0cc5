"""Opens a model folder and says what is wrong with it before hours are spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.checkpoint import check_finite, open_checkpoint
from buildsys.formats.config_file import ConfigFile
from buildsys.formats.group_quantized import DequantizedTensors, read_packing
from buildsys.formats.tensors import RenamedSource, TensorSource
from buildsys.models import llama, qwen2, qwen2_5_vl, qwen2_vl, qwen3
from buildsys.models.config import ModelConfig, read_model_config
from buildsys.models.errors import ModelError
from buildsys.models.family import Family
from buildsys.models.key_layout import to_classic

FAMILIES: Mapping[str, Callable[[ModelConfig], Family]] = {
    "qwen2": qwen2.describe,
    "qwen2_vl": qwen2_vl.describe,
    "qwen2_5_vl": qwen2_5_vl.describe,
    "qwen3": qwen3.describe,
    "llama": llama.describe,
}
BLOCK = re.compile(r"(.+\.)([0-9]+)\.")
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Model:
    """A checkpoint with its description. `tensors` has classic names and only the family's
    own tensors, in their stored dtype; a tied head is not among them."""

    folder: Path
    config: ModelConfig
    family: Family
    tensors: TensorSource


def open_model(folder: str | PathLike[str]) -> Model:
    """The model in `folder`: config.json and safetensors or torch weights, sharded or not, in
    floats or in AWQ's or GPTQ's integers.

    Headers only are read; values are checked for NaN and infinity as they are read.
    Raises ModelError for an unsupported model_type, a missing tensor, a wrong shape or dtype,
    and FormatError for a damaged file; both name the tensor or the field.
    """
    place = Path(folder)
    config = read_model_config(place)
    family = describe(config)
    return Model(place, config, family, family_tensors(float_tensors(config, place), family))


def float_tensors(config: ModelConfig, folder: Path) -> TensorSource:
    """The checkpoint's tensors; linears that AWQ or GPTQ packed are dequantized as they are
    read. Raises FormatError for a method that is not known."""
    source = open_checkpoint(folder)
    packing = read_packing(ConfigFile(config.file, config.raw))
    return source if packing is None else DequantizedTensors(source, packing)


def describe(config: ModelConfig) -> Family:
    """The family of a config. Raises ModelError naming the supported model types."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{config.model_type!r} is not supported",
            file=config.file,
            field="model_type",
            remedy=f"Supported: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[config.model_type](config)


def family_tensors(source: TensorSource, family: Family) -> TensorSource:
    """The family's tensors in `source`, classic names in state-dict order, checked.

    What the family does not know (old rotary buffers) is left out. Raises ModelError for a
    tensor that is missing, of the wrong shape or dtype, or of a layer that config.json lacks.
    """
    stored = {to_classic(name): name for name in source.names()}
    wanted = dict(family.shapes)
    _check_depth(source, stored, wanted)
    head = family.head.weight_name
    if family.tied:
        # A tied head that is stored as well is a copy of the embedding, and never read.
        del wanted[head]
    for name, shape in wanted.items():
        _check_tensor(source, name, stored, shape)
    return CheckedTensors(RenamedSource(source, {name: stored[name] for name in wanted}))


def _check_depth(
    source: TensorSource, stored: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """No layer may be left out: the model without it would be another one."""
    numbers: dict[str, int] = {}
    for name in wanted:
        if block := BLOCK.match(name):
            numbers[block[1]] = max(numbers.get(block[1], 0), int(block[2]))
    for name in stored:
        block = BLOCK.match(name)
        if block and int(block[2]) > numbers.get(block[1], int(block[2])):
            raise ModelError(
                f"is of a layer beyond the {numbers[block[1]] + 1} that config.json promises",
                file=source.path,
                tensor=stored[name],
                remedy="Weights and config.json must be of one model.",
            )


def _check_tensor(
    source: TensorSource, name: str, stored: Mapping[str, str], shape: tuple[int, ...]
) -> None:
    if name not in stored:
        raise ModelError(
            f"is missing (config.json promises it with shape {list(shape)})",
            file=source.path,
            tensor=name,
            remedy="The download may be incomplete, or config.json belongs to another model.",
        )
    found = source.shape(stored[name])
    if found != shape:
        raise ModelError(
            f"has shape {list(found)}, config.json promises {list(shape)}",
            file=source.path,
            tensor=name,
            remedy="Weights and config.json must be of one model.",
        )
    if source.dtype(stored[name]) not in FLOATS:
        raise ModelError(
            f"has type {source.stored_type(stored[name])}; a model needs F32, F16 or BF16",
            file=source.path,
            tensor=name,
            remedy="Quantized checkpoints must be dequantized first.",
        )


class CheckedTensors:
    """A source whose floating-point values are checked as they are read: no NaN, no infinity."""

    def __init__(self, source: TensorSource) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self._source = source

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def stored_type(self, name: str) -> str:
        return self._source.stored_type(name)

    def nbytes(self, name: str) -> int:
        return self._source.nbytes(name)

    def read(self, name: str) -> torch.Tensor:
        return self._checked(name, self._source.read(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._checked(name, self._source.rows(name, start, stop))

    def release(self, name: str) -> None:
        self._source.release(name)

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        check_finite(name, tensor, file=self.path)
        return tensor
