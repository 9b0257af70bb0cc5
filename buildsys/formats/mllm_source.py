"""What the readers of .mllm v1 and v2 share, and the types that a checkpoint gets in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.mapped_file import MappedFile
from buildsys.formats.mllm_types import LAST_SHARED_CODE, PLAIN, MllmEntry, MllmType, plain_entry
from buildsys.formats.tensors import TensorSource, no_such_tensor

DAMAGED = "The file was cut short, or the tool that wrote it was stopped: make it again."


@dataclass(frozen=True)
class StoredPayload:
    """Where the payload of an entry lies, in bytes from the start of the file."""

    entry: MllmEntry
    offset: int


class MllmSource:
    """The tensors of a .mllm file, mapped. Quantized types are read as uint8 [nbytes]."""

    def __init__(
        self,
        file: MappedFile,
        stored: Sequence[StoredPayload],
        metadata: Mapping[str, object],
    ) -> None:
        self.path = file.path
        self.metadata = metadata
        self._file = file
        self._stored = {payload.entry.name: payload for payload in stored}
        check_payloads(file, stored)

    def names(self) -> Sequence[str]:
        return list(self._stored)

    def entry(self, name: str) -> MllmEntry:
        """Name, type code, logical shape and bytes, as a writer takes them."""
        if name not in self._stored:
            raise no_such_tensor(name, self._stored, self.path)
        return self._stored[name].entry

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).payload().shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).payload().dtype

    def stored_type(self, name: str) -> str:
        return self.entry(name).type.name

    def nbytes(self, name: str) -> int:
        return self.entry(name).nbytes

    def read(self, name: str) -> torch.Tensor:
        payload = self.entry(name).payload()
        return self._file.tensor(self._stored[name].offset, payload.dtype, payload.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        payload = self.entry(name).payload()
        offset = self._stored[name].offset
        return self._file.rows(offset, payload.dtype, payload.shape, start, stop)

    def release(self, name: str) -> None:
        self._file.release(self._stored[name].offset, self.nbytes(name))


def check_payloads(file: MappedFile, stored: Sequence[StoredPayload]) -> None:
    """Raises FormatError for a name that is there twice and for data outside the file."""
    if not stored:
        raise FormatError("lists no tensor", file=file.path, remedy=DAMAGED)
    seen: set[str] = set()
    end = 0
    for payload in sorted(stored, key=lambda payload: payload.offset):
        entry = payload.entry
        fault = None
        if entry.name in seen:
            fault = "is listed twice"
        elif payload.offset + entry.nbytes > file.size:
            after = payload.offset + entry.nbytes
            fault = f"its data ends at byte {after}, the file at {file.size}"
        elif payload.offset < end:
            fault = "its data overlaps the one before it"
        if fault:
            raise FormatError(fault, file=file.path, tensor=entry.name, remedy=DAMAGED)
        seen.add(entry.name)
        end = payload.offset + entry.nbytes


def type_of_code(code: int, version: int, name: str, path: Path) -> MllmType:
    """The type of a code. Raises FormatError for a code that this version does not have."""
    newer = code > LAST_SHARED_CODE and (code >= MllmType.BF16) != (version == 2)
    if newer or code not in MllmType.__members__.values():
        raise FormatError(
            f"type code {code} is unknown in version {version}", file=path, tensor=name
        )
    return MllmType(code)


def mllm_entries(
    source: TensorSource, types: Mapping[torch.dtype, MllmType], version: int
) -> list[MllmEntry]:
    """The table for all tensors of a source: .mllm types are kept, dtypes go by `types`."""
    return [_entry_for(source, name, types, version) for name in source.names()]


def _entry_for(
    source: TensorSource, name: str, types: Mapping[torch.dtype, MllmType], version: int
) -> MllmEntry:
    kind = types.get(source.dtype(name))
    if isinstance(source, MllmSource):
        entry = source.entry(name)
        if _is_known(entry.type, version):
            return entry
        kind = types.get(PLAIN[entry.type]) if entry.type in PLAIN else None
    if kind is None:
        raise FormatError(
            f"{source.stored_type(name)} has no type code in .mllm version {version}",
            file=source.path,
            tensor=name,
        )
    if kind not in PLAIN:
        return MllmEntry(name, kind, source.shape(name), source.nbytes(name))
    return plain_entry(name, kind, source.shape(name))


def _is_known(kind: MllmType, version: int) -> bool:
    return kind <= LAST_SHARED_CODE or (kind >= MllmType.BF16) == (version == 2)


def conversion(
    source: TensorSource, name: str, entry: MllmEntry
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What turns a part of the source's tensor into the entry's payload; None for nothing.

    float16, bfloat16, float64 and int64 may have to become float32. An int64 value that
    float32 cannot hold raises FormatError.
    """
    wanted = entry.payload().dtype
    if source.dtype(name) == wanted:
        return None

    def convert(part: torch.Tensor) -> torch.Tensor:
        converted = part.to(wanted)
        if part.dtype == torch.int64 and not torch.equal(converted.to(torch.int64), part):
            raise FormatError(
                "has integers that float32, the type it gets in .mllm, cannot hold",
                file=source.path,
                tensor=name,
                remedy="Leave it out, or store it as int32.",
            )
        return converted

    return convert
