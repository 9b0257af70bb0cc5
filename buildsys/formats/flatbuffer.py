"""Reads a flatbuffer without its generated code: tables by the numbers of their fields.

Format: a table begins with the distance back to its vtable, which holds for every field where it
lies in the table (0: absent, and the value is the default). Everything is little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

U16, U32, I32, U64 = (struct.Struct(f"<{letter}") for letter in "HIiQ")


@dataclass(frozen=True)
class Table:
    """A table of the buffer `data` that begins at `at`. Fields are named by their number; one
    that is absent is 0, empty or None. struct.error where the buffer ends too early."""

    data: bytes
    at: int

    def place(self, field: int) -> int:
        """Where the field's value lies; 0 where it is absent."""
        vtable = self.at - _read(I32, self.data, self.at)
        inside = 4 + 2 * field
        if inside >= _read(U16, self.data, vtable):
            return 0
        offset = _read(U16, self.data, vtable + inside)
        return self.at + offset if offset else 0

    def u32(self, field: int) -> int:
        at = self.place(field)
        return _read(U32, self.data, at) if at else 0

    def u64(self, field: int) -> int:
        at = self.place(field)
        return _read(U64, self.data, at) if at else 0

    def u64_pair(self, field: int) -> tuple[int, int]:
        """A struct of two 64-bit numbers."""
        at = self.place(field)
        return (_read(U64, self.data, at), _read(U64, self.data, at + 8)) if at else (0, 0)

    def text(self, field: int) -> str:
        at, length = self.text_place(field)
        return self.data[at : at + length].decode("utf-8")

    def text_place(self, field: int) -> tuple[int, int]:
        """(start, bytes) of a text."""
        return self._vector(field, 1)

    def table(self, field: int) -> Table | None:
        at = self.place(field)
        return Table(self.data, at + _read(U32, self.data, at)) if at else None

    def tables(self, field: int) -> list[Table]:
        start, count = self._vector(field, 4)
        places = [start + 4 * index for index in range(count)]
        return [Table(self.data, at + _read(U32, self.data, at)) for at in places]

    def u64s(self, field: int) -> tuple[int, ...]:
        start, count = self._vector(field, 8)
        return tuple(_read(U64, self.data, start + 8 * index) for index in range(count))

    def _vector(self, field: int, width: int) -> tuple[int, int]:
        """(start of the first item, number of items), each `width` bytes."""
        at = self.place(field)
        if not at:
            return 0, 0
        start = at + _read(U32, self.data, at)
        count = _read(U32, self.data, start)
        if start + 4 + width * count > len(self.data):
            raise struct.error(f"{count} items, which is more than there is")
        return start + 4, count


def root_table(data: bytes) -> Table:
    """The table that a buffer is about."""
    return Table(data, _read(U32, data, 0))


def _read(kind: struct.Struct, data: bytes, at: int) -> int:
    if at < 0:
        raise struct.error("a place before the beginning")
    value: int = kind.unpack_from(data, at)[0]
    return value
