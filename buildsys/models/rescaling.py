"""Factors for the exact rescaling of up_proj's rows against down_proj's columns, on disk.

A safetensors file: every down_proj's name -> float64 [intermediate]; up's row j is divided by
factor j, down's column j multiplied by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from os import PathLike

import torch
from torch import Tensor

from buildsys.formats.ordered_writer import OrderedWriter
from buildsys.formats.safetensors_file import SafetensorsSource, SafetensorsWriter
from buildsys.formats.tensors import TensorEntry, TensorSource
from buildsys.models.family import Family
from buildsys.quant.rescale import up_down_factors


def balance_up_down(
    family: Family,
    tensors: TensorSource,
    *,
    powers_of_two: bool,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Iterator[tuple[str, Tensor]]:
    """(down_proj's name, factors) of every layer of `tensors`, one layer in memory at a time."""
    both = list(family.up_down_pairs)
    for done, (up, down) in enumerate(both):
        progress(done, len(both), "layers")
        rows, columns = tensors.read(up.weight_name), tensors.read(down.weight_name)
        yield down.name, up_down_factors(rows, columns, powers_of_two=powers_of_two)
        tensors.release(up.weight_name)
        tensors.release(down.weight_name)
    progress(len(both), len(both), "layers")


def save_rescaling(
    path: str | PathLike[str],
    family: Family,
    factors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write the factors as they come."""
    entries = [TensorEntry(d.name, torch.float64, d.shape[1:]) for _, d in family.up_down_pairs]
    writer: OrderedWriter = SafetensorsWriter(path, entries, metadata)
    with writer:
        for name, s in factors:
            writer.write(name, s)


def load_rescaling(path: str | PathLike[str]) -> dict[str, Tensor]:
    """down_proj's name -> factors. Raises FormatError; sizes are checked where they are used."""
    source = SafetensorsSource(path)
    return {name: source.read(name).clone() for name in source.names()}
