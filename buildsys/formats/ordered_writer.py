"""The part that all streamed writers share: a table first, then each payload once, in order."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import TensorEntry, raw_bytes


class OrderedWriter(ABC):
    """Keeps the order: payloads come as the table says, complete, or the file is removed.

    A wrong order, dtype or size is a mistake of the calling code, hence ValueError.
    """

    def __init__(self, path: str | PathLike[str], entries: Sequence[TensorEntry]) -> None:
        self.path = Path(path)
        self.entries = tuple(entries)
        check_names(self.path, self.entries)
        self._due = 0  # index of the entry whose payload comes next
        self._done = 0  # bytes of it that are already written

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The whole payload of the entry that is due, in its logical shape."""
        entry = self._expect(name, tensor)
        if tuple(tensor.shape) != entry.shape or self._done:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, the table says {entry.shape}")
        self._append(entry, tensor)

    def write_part(self, name: str, part: torch.Tensor) -> None:
        """The next slice, along the axis that is outermost in memory, of the entry that is due."""
        self._append(self._expect(name, part), part)

    def close(self) -> None:
        """Complete the file. Raises ValueError when payloads are missing."""
        if self._due < len(self.entries):
            raise ValueError(f"{self.path}: no payload for {self.entries[self._due].name}")
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException:
            self._abandon()
            raise
        if kind is not None:
            self._abandon()

    def _expect(self, name: str, tensor: torch.Tensor) -> TensorEntry:
        if self._due >= len(self.entries):
            raise ValueError(f"{name}: all {len(self.entries)} payloads are already written")
        entry = self.entries[self._due]
        if entry.name != name:
            raise ValueError(f"payload of {name} came where {entry.name} is due")
        if entry.dtype != tensor.dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype}, the table says {entry.dtype}")
        return entry

    def _append(self, entry: TensorEntry, tensor: torch.Tensor) -> None:
        if entry.stride is not None and tensor.dim() > 1:
            tensor = tensor.permute(memory_order(entry.stride))
        data = raw_bytes(tensor)
        if self._done + data.nbytes > entry.nbytes:
            raise ValueError(f"{entry.name}: more than the {entry.nbytes} bytes of the table")
        if self._done == 0:
            self._begin(self._due)
        self._put(data)
        self._done += data.nbytes
        if self._done == entry.nbytes:
            self._end()
            self._due += 1
            self._done = 0

    @abstractmethod
    def _begin(self, index: int) -> None:
        """Before the first byte of payload number `index`."""

    @abstractmethod
    def _end(self) -> None:
        """After the last byte of a payload."""

    @abstractmethod
    def _put(self, data: memoryview) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _abandon(self) -> None: ...


class HeaderAndPayloads(OrderedWriter):
    """A file that is a header and then the payloads without gaps: safetensors, .mllm."""

    def __init__(
        self, path: str | PathLike[str], entries: Sequence[TensorEntry], header: bytes
    ) -> None:
        super().__init__(path, entries)
        self._stream = open_for_writing(self.path)
        self._stream.write(header)

    def _begin(self, index: int) -> None:
        """Nothing stands between payloads."""

    def _end(self) -> None:
        """Nothing stands between payloads."""

    def _put(self, data: memoryview) -> None:
        self._stream.write(data)

    def _finish(self) -> None:
        self._stream.close()

    def _abandon(self) -> None:
        self._stream.close()
        self.path.unlink(missing_ok=True)


def open_for_writing(path: Path) -> io.BufferedWriter:
    """Open a new file. Raises FormatError where the folder is missing or not writable."""
    try:
        return path.open("wb")
    except OSError as error:
        raise FormatError(f"cannot be written: {error.strerror}", file=path) from error


def check_names(path: Path, entries: Sequence[TensorEntry]) -> None:
    """Raises FormatError when two entries would have one name."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise FormatError("is in the table twice", file=path, tensor=entry.name)
        seen.add(entry.name)


def memory_order(stride: Sequence[int]) -> list[int]:
    """Axes from the outermost in memory to the innermost: `permute` by it gives C order."""
    return sorted(range(len(stride)), key=lambda axis: -stride[axis])
