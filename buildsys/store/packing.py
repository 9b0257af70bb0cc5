"""Blobs on the wire: zstd level 1 where the first MiB shrinks by a twentieth, else as they are.

Weights shrink little (bf16 1.28x, int8 1.07x), and higher levels gain nothing worth their time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, cast

from blake3 import blake3

SAMPLE = 1 << 20
SMALLEST = 512  # bytes: nothing to gain below
GAIN = 0.05
LEVEL = 1


class TooLong(ValueError):
    """More arrives than the record says."""


def pays(path: str) -> bool:
    """Is it worth packing?"""
    import zstandard

    with open(path, "rb") as file:
        sample = file.read(SAMPLE)
    if len(sample) < SMALLEST:
        return False
    return len(zstandard.compress(sample, LEVEL)) <= (1 - GAIN) * len(sample)


def pack(path: str, target: str) -> None:
    """Write the packed file."""
    import zstandard

    with open(path, "rb") as source, open(target, "xb") as packed:
        zstandard.ZstdCompressor(level=LEVEL).copy_stream(source, packed)


class Verifier:
    """Writes what arrives to a file, unpacked, and knows its digest.

    Never writes more than the promised size, whatever arrives.
    """

    def __init__(self, write: Callable[[bytes], object], size: int, *, packed: bool) -> None:
        self._write = write
        self._left = size
        self._hasher = blake3()
        self._into = self._take
        if packed:
            import zstandard

            # Hands over bounded pieces, however much a few bytes may become.
            out = cast("IO[bytes]", _Out(self._take))
            self._into = zstandard.ZstdDecompressor().stream_writer(out, closefd=False).write

    def write(self, data: bytes) -> None:
        """Raises TooLong, or zstandard.ZstdError for what is no zstd."""
        self._into(data)

    def is_right(self, digest: str) -> bool:
        return self._left == 0 and self._hasher.hexdigest() == digest

    def _take(self, data: bytes) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise TooLong("more arrives than the record says")
        self._hasher.update(data)
        self._write(data)
        return len(data)


class _Out:
    """What zstandard wants to write to."""

    def __init__(self, take: Callable[[bytes], int]) -> None:
        self.write = take
