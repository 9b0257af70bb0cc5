"""A file mapped into memory: tensors over its bytes, and pages given back when done."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from buildsys.formats.errors import FormatError

# A private writable mapping of a file larger than memory is refused by the kernel's overcommit
# heuristic unless no swap is reserved for it. The mmap module names the flag only from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """The bytes of one file. A tensor from it stays valid as long as the tensor lives.

    The mapping is private: torch wants writable memory, and a stray write would touch a copy
    of the page and never the file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                self.size = stream.seek(0, 2)
                self._map = _map_private(stream.fileno(), self.size) if self.size else None
        except OSError as error:
            raise FormatError(
                f"cannot be read: {error.strerror}",
                file=self.path,
                remedy="Give a path that exists and may be read.",
            ) from error

    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of `nbytes` bytes from `offset`; the caller has checked the bounds."""
        if self._map is None or nbytes == 0:
            return b""
        return self._map[offset : offset + nbytes]

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A contiguous tensor over the mapped bytes, or a copy where they are not aligned."""
        count = math.prod(shape)
        if count == 0 or self._map is None:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset % dtype.itemsize == 0:
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        else:
            # .mllm files are packed: one clip flag misaligns every float after it.
            raw = bytearray(self._map[offset : offset + count * dtype.itemsize])
            flat = torch.frombuffer(raw, dtype=dtype, count=count)
        return flat.reshape(tuple(shape))

    def rows(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], start: int, stop: int
    ) -> torch.Tensor:
        """`tensor(offset, dtype, shape)[start:stop]`, touching only the bytes of those rows."""
        first, last, _ = slice(start, stop).indices(shape[0])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return self.tensor(offset + first * row_bytes, dtype, (max(0, last - first), *shape[1:]))

    def release(self, offset: int, nbytes: int) -> None:
        """Give the pages of this range back; they are read again when touched again."""
        if self._map is None or nbytes == 0:
            return
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, offset + nbytes - first)


def _map_private(descriptor: int, size: int) -> mmap.mmap:
    return mmap.mmap(
        descriptor,
        size,
        flags=mmap.MAP_PRIVATE | _NO_RESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )
