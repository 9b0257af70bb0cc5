"""What is inside a file: its tensors and what it says of itself, for any format we read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.bmodel_file import BMODEL_MAGIC, read_bmodel, summary
from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.elf_file import MAGIC as ELF_MAGIC
from buildsys.formats.elf_file import read_elf_header
from buildsys.formats.errors import FormatError
from buildsys.formats.mllm_source import MllmSource
from buildsys.formats.mllm_tokenizer import MAGIC as VOCABULARY_MAGIC
from buildsys.formats.mllm_tokenizer import read_mllm_vocabulary
from buildsys.formats.mxq_file import MXQ_MAGIC, read_mxq_summary
from buildsys.formats.qnn_binary import MAGIC as QNN_MAGIC
from buildsys.formats.qnn_binary import is_qnn_binary
from buildsys.formats.qnn_description import rows
from buildsys.formats.qnn_description import summary as qnn_summary
from buildsys.formats.rotation_file import load_rotation, matrices_of
from buildsys.formats.tensors import JoinedSource, TensorSource
from buildsys.formats.torch_file import TorchFileSource, load_guarded
from buildsys.formats.torchscript_file import is_torchscript


@dataclass(frozen=True)
class TensorLine:
    """One tensor: its logical shape and the bytes that it takes in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Description:
    """The format by name, the tensors in the order of the file, and the metadata."""

    path: Path
    format: str
    tensors: tuple[TensorLine, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)

    def totals(self) -> dict[str, tuple[int, int]]:
        """(number of tensors, bytes) of each type, the largest first. What follows the second
        word of a type is one tensor's encoding."""
        sums: dict[str, tuple[int, int]] = {}
        for line in self.tensors:
            kind = " ".join(line.type.split()[:2])
            count, nbytes = sums.get(kind, (0, 0))
            sums[kind] = (count + 1, nbytes + line.nbytes)
        return dict(sorted(sums.items(), key=lambda item: (-item[1][1], item[0])))


def describe(
    path: str | PathLike[str], qnn_library: Callable[[], str | None] = lambda: None
) -> Description:
    """Describe a checkpoint, a rotation, a .mllm vocabulary, an .mxq, a .bmodel, a QNN context or
    an ELF file.

    qnn_library: finds a libQnnSystem.so; asked for a QNN context only. Raises FormatError for a
    file that is none of these, or is damaged.
    """
    place = Path(path)
    start = _first_bytes(place)
    if start == ELF_MAGIC:
        return Description(place, "ELF", metadata=asdict(read_elf_header(place)))
    if start == BMODEL_MAGIC:
        return Description(place, "bmodel", metadata=_bmodel_metadata(place))
    if start == QNN_MAGIC[:4] and is_qnn_binary(place):
        return _describe_context(place, qnn_library())
    if start == MXQ_MAGIC:
        return Description(place, "mxq", metadata=read_mxq_summary(place))
    if start == VOCABULARY_MAGIC.to_bytes(4, "little"):
        tokens = read_mllm_vocabulary(place)
        return Description(place, "mllm vocabulary", metadata={"tokens": len(tokens)})
    if start == b"PK\x03\x04" and _is_rotation(place):
        return _describe_rotation(place)
    source = open_checkpoint(place)
    lines = tuple(_line(source, name) for name in source.names())
    return Description(place, _format_name(source), lines, _metadata(source))


def _describe_context(place: Path, library: str | None) -> Description:
    """Inputs and outputs with their encodings in the place of tensors."""
    metadata, graphs = qnn_summary(place, library)
    lines = tuple(TensorLine(*row) for row in rows(graphs))
    return Description(place, "QNN context", lines, metadata)


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as stream:
            return stream.read(4)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from error


def _bmodel_metadata(path: Path) -> dict[str, object]:
    """One line for each net, by its name; with its place in the file where names repeat."""
    told = summary(read_bmodel(path))
    nets = told.pop("nets")
    assert isinstance(nets, list)
    lines = {
        f"net {number} {net['name']}": f"{', '.join(net['inputs'])} -> {', '.join(net['outputs'])}"
        for number, net in enumerate(nets)
    }
    return {**told, **lines}


def _is_rotation(path: Path) -> bool:
    if is_torchscript(path):
        return True
    content = load_guarded(path)
    return isinstance(content, dict) and isinstance(content.get("R"), torch.Tensor)


def _describe_rotation(path: Path) -> Description:
    rotation = load_rotation(path)
    kinds = {"mllm": "rotation (mllm)", "torchscript": "rotation (TorchScript, Mobilint)"}
    lines = _plain_lines(matrices_of(rotation))
    return Description(path, kinds[rotation.format], lines, rotation.metadata)


def _plain_lines(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorLine, ...]:
    return tuple(
        TensorLine(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes)
        for name, t in tensors
    )


def _line(source: TensorSource, name: str) -> TensorLine:
    shape = source.entry(name).shape if isinstance(source, MllmSource) else source.shape(name)
    return TensorLine(name, source.stored_type(name), shape, source.nbytes(name))


def _format_name(source: TensorSource) -> str:
    if isinstance(source, JoinedSource):
        parts = source.parts()
        return f"{_format_name(parts[0])}, {len(parts)} files" if parts else "no files"
    if isinstance(source, MllmSource):
        return str(source.metadata["format"])
    if isinstance(source, TorchFileSource):
        return "torch"
    return "GGUF" if type(source).__name__ == "GGUFSource" else "safetensors"


def _metadata(source: TensorSource) -> dict[str, object]:
    metadata = dict(source.metadata)
    if isinstance(source, MllmSource):
        del metadata["format"]
        if source.metadata["format"] == "mllm v1":
            metadata["shapes"] = "not stored in version 1: elements or bytes are shown"
    if isinstance(source, TorchFileSource) and source.ignored:
        metadata["entries that are no tensors"] = list(source.ignored)
    return metadata
