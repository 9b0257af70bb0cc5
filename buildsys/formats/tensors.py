"""What every reader and every writer of tensors is, and how one streams into the other.

A `TensorSource` reads by name, without holding the file in memory. A `TensorWriter` is opened
with the whole table (names, dtypes, shapes) and then takes the payloads in the order of the
table, each exactly once, whole or in parts along the first axis, so that memory stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from buildsys.formats.errors import FormatError

# One part of a streamed tensor: large enough for full disk speed, small beside 300 MiB.
PART_BYTES = 16 * 2**20


class TensorSource(Protocol):
    """Named tensors in a file or in a set of files, read one by one."""

    @property
    def path(self) -> Path:
        """The file or folder that was opened."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the file says of itself beside its tensors."""

    def names(self) -> Sequence[str]:
        """All names, in the order of the file."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape; `(numel,)` where the format stores none."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives; uint8 for raw bytes of a quantized type."""

    def stored_type(self, name: str) -> str:
        """The format's own name of the type, such as `BF16` or `Q4_K`."""

    def nbytes(self, name: str) -> int:
        """Bytes of the payload in the file."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor; it may lie over the mapped file, so the caller must not write to it."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """`read(name)[start:stop]`, without the rest of it."""

    def release(self, name: str) -> None:
        """The caller is done with this tensor for now: its memory may be given back."""


@dataclass(frozen=True)
class TensorEntry:
    """One line of a writer's table.

    `stride` (in elements) is kept by formats that can (.pth): int8 weights of mllm have the
    logical shape [in, out] over storage that lies [out, in]. None means C order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter(Protocol):
    """Takes the payloads of its table in order; the file is complete when it is closed."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The whole payload of the entry that is due."""

    def write_part(self, name: str, part: torch.Tensor) -> None:
        """The next slice, along the axis that is outermost in memory, of the entry that is due."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor as little-endian bytes in C order; a view where it can be one."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def entries_of(source: TensorSource, names: Sequence[str] | None = None) -> list[TensorEntry]:
    """The table that copies `source` (or the given names of it) unchanged."""
    chosen = source.names() if names is None else names
    return [TensorEntry(name, source.dtype(name), source.shape(name)) for name in chosen]


def row_parts(
    shape: Sequence[int], itemsize: int, limit: int = PART_BYTES
) -> Iterator[tuple[int, int]]:
    """(start, stop) along the first axis, such that a part has about `limit` bytes at most."""
    rows = shape[0] if shape else 1
    row_bytes = max(1, math.prod(shape[1:]) * itemsize)
    step = max(1, limit // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def copy_tensor(
    source: TensorSource,
    name: str,
    writer: TensorWriter,
    *,
    target: str | None = None,
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Stream one tensor from a source into a writer, part by part.

    `target` is the name in the writer's table (default: the same). `convert` is applied to
    each part and must not look across rows.
    """
    into = name if target is None else target
    shape = source.shape(name)
    if not shape or shape[0] == 0:
        tensor = source.read(name)
        writer.write(into, tensor if convert is None else convert(tensor))
        return
    for start, stop in row_parts(shape, source.dtype(name).itemsize):
        part = source.rows(name, start, stop)
        writer.write_part(into, part if convert is None else convert(part))
    source.release(name)


class RenamedSource:
    """A source under other names, or a part of it: `names` maps each new name to the old one."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        present = set(source.names())
        for old in names.values():
            if old not in present:
                raise FormatError("is not in the file", file=source.path, tensor=old)
        self.path = source.path
        self.metadata = source.metadata
        self._source = source
        self._old = dict(names)

    def names(self) -> Sequence[str]:
        return list(self._old)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._find(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._find(name))

    def stored_type(self, name: str) -> str:
        return self._source.stored_type(self._find(name))

    def nbytes(self, name: str) -> int:
        return self._source.nbytes(self._find(name))

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._find(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._source.rows(self._find(name), start, stop)

    def release(self, name: str) -> None:
        self._source.release(self._find(name))

    def _find(self, name: str) -> str:
        if name not in self._old:
            raise no_such_tensor(name, self._old, self.path)
        return self._old[name]


class JoinedSource:
    """Several files that together hold one checkpoint; each name is in exactly one of them."""

    def __init__(
        self, path: Path, owners: Mapping[str, TensorSource], metadata: Mapping[str, object]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._owners = dict(owners)

    def parts(self) -> list[TensorSource]:
        """The files, in the order in which their tensors come."""
        return list({id(owner): owner for owner in self._owners.values()}.values())

    def names(self) -> Sequence[str]:
        return list(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._owner(name).dtype(name)

    def stored_type(self, name: str) -> str:
        return self._owner(name).stored_type(name)

    def nbytes(self, name: str) -> int:
        return self._owner(name).nbytes(name)

    def read(self, name: str) -> torch.Tensor:
        return self._owner(name).read(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._owner(name).rows(name, start, stop)

    def release(self, name: str) -> None:
        self._owner(name).release(name)

    def _owner(self, name: str) -> TensorSource:
        if name not in self._owners:
            raise no_such_tensor(name, self._owners, self.path)
        return self._owners[name]


def no_such_tensor(name: str, present: Mapping[str, object], path: Path) -> FormatError:
    """The error for a name that a file does not have, with the nearest one that it has."""
    import difflib

    near = difflib.get_close_matches(name, present, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else None
    return FormatError(
        f"is not among the {len(present)} tensors", file=path, tensor=name, remedy=remedy
    )
