"""A folder of calibration samples, one .npy array each, as Mobilint's compiler reads them.

    sample_000/NAME.npy ...   float32, numpy's own format
    metadata.json             what each sample is
    npy_files.txt             one path per line, in order, relative to the folder

The vendor's scripts list absolute paths, which a moved folder breaks: `absolute_list` makes such
a list where and when a compiler is called.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buildsys.formats.errors import FormatError

LIST, METADATA = "npy_files.txt", "metadata.json"
UNFINISHED = "."  # begins the name of a sample that is being written


def sample_folder(index: int) -> str:
    """The name of sample `index`: it keeps its number where others are left out."""
    return f"sample_{index:03d}"


def write_sample(folder: Path, index: int, name: str, array: torch.Tensor) -> None:
    """Write one array, whole or not at all: what is there after a crash is complete."""
    place = folder / sample_folder(index)
    part = folder / f"{UNFINISHED}{place.name}"
    part.mkdir()
    with (part / f"{name}.npy").open("wb") as file:
        np.save(file, array.contiguous().numpy(), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    part.rename(place)


def discard_unfinished(folder: Path) -> None:
    """Remove what a write that was killed has left."""
    for place in folder.glob(f"{UNFINISHED}sample_*"):
        shutil.rmtree(place)


def sample_shape(folder: Path, index: int, name: str) -> tuple[int, ...] | None:
    """The shape of a sample's array; None where it is not there. Raises FormatError."""
    file = folder / sample_folder(index) / f"{name}.npy"
    return _read_header(file) if file.is_file() else None


def write_index(
    folder: Path, name: str, indices: Sequence[int], metadata: Mapping[str, Any]
) -> None:
    """Write the list of samples and what is said of them."""
    lines = [f"{sample_folder(index)}/{name}.npy\n" for index in indices]
    (folder / LIST).write_text("".join(lines), encoding="utf-8")
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    (folder / METADATA).write_text(text + "\n", encoding="utf-8")


def read_list(folder: Path) -> list[Path]:
    """The arrays of a set, in order, wherever the folder lies now.

    Raises FormatError for a list that is missing or empty, and for a file that is not there or
    is no float32 array. Absolute paths are accepted where they lead to a file.
    """
    listing = folder / LIST
    if not listing.is_file():
        message = f"has no {LIST}"
        raise FormatError(message, file=folder, remedy="Give a folder made by calibration-set.")
    files = [folder / line for line in listing.read_text(encoding="utf-8").splitlines() if line]
    if not files:
        raise FormatError("lists no sample", file=listing)
    for file in files:
        _read_header(file)
    return files


def absolute_list(folder: Path, target: Path) -> None:
    """Write the list that compilers want: one absolute path per line. Raises FormatError."""
    lines = [f"{file.resolve()}\n" for file in read_list(folder)]
    target.write_text("".join(lines), encoding="utf-8")


def _read_header(file: Path) -> tuple[int, ...]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"is no whole .npy array ({error})", file=file) from error
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise FormatError("is no array of float32", file=file)
    return tuple(int(size) for size in array.shape)
