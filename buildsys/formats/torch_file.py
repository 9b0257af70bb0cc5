"""Reads torch's own checkpoints (.pth, .pt, .bin) without executing anything in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import no_such_tensor

# A state dict may lie under one of these keys (training loops, mllm's converter).
WRAPPERS = ("model", "state_dict")
# Pages of torch's mapping cannot be given back one by one: the file is opened anew after these.
REOPEN_AFTER = 256 * 2**20


class TorchFileSource:
    """The tensors of a .pth/.bin file; `ignored` lists the entries that are no tensors.

    Raises FormatError for a damaged file and for one that needs code to be loaded.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: Mapping[str, object] = {}
        self._tensors, self.ignored = _tensors_of(load_guarded(self.path), self.path)
        self._released = 0

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.read(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype

    def stored_type(self, name: str) -> str:
        return str(self.read(name).dtype).removeprefix("torch.")

    def nbytes(self, name: str) -> int:
        return self.read(name).nbytes

    def read(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise no_such_tensor(name, self._tensors, self.path)
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        self._released += self.nbytes(name)
        if self._released >= REOPEN_AFTER:
            self._released = 0
            self._tensors, self.ignored = _tensors_of(load_guarded(self.path), self.path)


def load_guarded(path: str | PathLike[str]) -> object:
    """`torch.load` that executes nothing: tensors mapped, on the CPU.

    Raises FormatError for a missing, damaged, or TorchScript file, and for a pickle that needs
    code.
    """
    file = Path(path)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"refused, because loading it would run code or it is damaged: {_first_line(error)}",
            file=file,
            remedy="Save it as a plain dict of tensors, or as .safetensors.",
        ) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}", file=file) from error
    except MemoryError:
        raise
    except Exception as error:  # what torch raises for damaged bytes depends on where they are
        raise FormatError(
            f"is damaged, or no torch checkpoint: {_first_line(error)}",
            file=file,
            remedy="Copy or download it again.",
        ) from error


def _can_be_mapped(file: Path) -> bool:
    """Only zip archives can (torch >= 1.6); older pickles are read into memory."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _tensors_of(content: object, path: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise FormatError(
            f"holds a {type(content).__name__}, not a dict of tensors",
            file=path,
            remedy="Save model.state_dict().",
        )
    tensors = {
        name: tensor.detach()
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    ignored = tuple(str(name) for name in content if name not in tensors)
    if not tensors:
        raise FormatError("holds no tensor", file=path, remedy="Save model.state_dict().")
    return tensors, ignored
