"""Opens any checkpoint that qbuild reads, by content first and by name second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.safetensors_file import SafetensorsSource
from buildsys.formats.shards import open_index, open_shards
from buildsys.formats.tensors import TensorSource

READABLE = (
    "Readable are .safetensors, .pth, .pt, .bin, .mllm (v1, v2), .gguf, an index "
    "(*.index.json), and a folder with one of these."
)
# Where a folder holds several, the first of these is meant (transformers' order).
_FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_FOLDER_PATTERNS = ("*.safetensors", "*.pth", "*.bin", "*.mllm", "*.gguf")
_MAGIC_MLLM_V1 = (20012).to_bytes(4, "little")
_MAGIC_MLLM_V2 = (0x519A).to_bytes(4, "little")


def open_checkpoint(
    path: str | PathLike[str], shapes: Mapping[str, Sequence[int]] | None = None
) -> TensorSource:
    """Open a checkpoint: a file, an index or a folder. No tensor is read yet.

    `shapes` gives the shapes that a .mllm v1 file does not store.
    Raises FormatError where nothing readable is found, or what is found is damaged.
    """
    place = Path(path)
    if place.is_dir():
        return _open_folder(place)
    if not place.is_file():
        raise FormatError("does not exist", file=place, remedy=READABLE)
    if place.name.endswith(".index.json"):
        return open_index(place, open_checkpoint)
    with place.open("rb") as stream:
        start = stream.read(9)
    return _open_file(place, start, shapes)


def _open_file(
    path: Path, start: bytes, shapes: Mapping[str, Sequence[int]] | None
) -> TensorSource:
    # Imports stand here so that a safetensors checkpoint does not pay for the others.
    if start[:4] == _MAGIC_MLLM_V1:
        from buildsys.formats.mllm_v1 import open_mllm_v1

        return open_mllm_v1(path, shapes)
    if start[:4] == _MAGIC_MLLM_V2:
        from buildsys.formats.mllm_v2 import open_mllm_v2

        return open_mllm_v2(path)
    if start[:4] == b"GGUF":
        from buildsys.formats.gguf_file import GGUFSource

        return GGUFSource(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return SafetensorsSource(path)
    if start[:4] == b"PK\x03\x04" or path.suffix in (".pth", ".pt", ".bin"):
        from buildsys.formats.torch_file import TorchFileSource

        return TorchFileSource(path)
    raise FormatError("is no checkpoint that qbuild knows", file=path, remedy=READABLE)


def _open_folder(folder: Path) -> TensorSource:
    for name in _FOLDER_NAMES:
        if (folder / name).is_file():
            return open_checkpoint(folder / name)
    for pattern in _FOLDER_PATTERNS:
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return open_checkpoint(files[0])
        if files:
            return open_shards(folder, files, open_checkpoint)
    raise FormatError("holds no checkpoint", file=folder, remedy=READABLE)


def check_finite(
    name: str, tensor: torch.Tensor, *, file: str | PathLike[str] | None = None
) -> None:
    """Raises FormatError, naming the tensor, where a floating point one has NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    nans = infinities = 0
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), 2**22):
        part = flat[start : start + 2**22]
        if not bool(torch.isfinite(part).all()):
            nans += int(torch.isnan(part).sum())
            infinities += int(torch.isinf(part).sum())
    if nans or infinities:
        raise FormatError(
            f"holds {nans} NaN and {infinities} infinite values among {tensor.numel()}",
            file=file,
            tensor=name,
            remedy="The checkpoint is damaged or was trained to divergence: use another one.",
        )
