"""The state dict that mllm's QNN export makes of a model: int8 weights and static ranges.

In state-dict order: a quantized weight is int8, transposed to [in, out] over storage that lies
[out, in], followed by its `.scale` (0-d float32, already /127); biases stay float32, or with
quant_bias become int32 with a `.scale`. Then, for every linear of the scales file in its order,
`.input_scale`, `.output_scale` (0-d float32 magnitudes, not /127), `.clip_input`, `.clip_output`
(0-d bool). Source: mllm v1 tools/qnn_convertor/export_qnn_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from buildsys.formats.tensors import TensorEntry, TensorSource, copy_tensor
from buildsys.formats.torch_archive import StateDictWriter
from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Linear
from buildsys.models.scales import Scales, Side
from buildsys.models.variant import StaticRanges
from buildsys.quant.int8 import (
    ActivationScale,
    choose_scale,
    quantize_bias,
    quantize_weight,
    share_scales,
)

if TYPE_CHECKING:
    from buildsys.models.rounded import Rounded

# A linear whose activations are all zero still needs a range to divide by.
SMALLEST_RANGE = 1e-5


@dataclass(frozen=True)
class LinearScales:
    """The ranges and clip flags of one linear."""

    input: ActivationScale
    output: ActivationScale


@dataclass(frozen=True)
class Int8Layout:
    """What becomes int8, and the ranges of all linears in the order of the scales file.

    quant_bias: biases become int32. correct_bias: they take what rounding takes from outputs.
    """

    quantized: frozenset[str]
    scales: Mapping[str, LinearScales]
    quant_bias: bool
    correct_bias: bool = False

    def ranges(self) -> dict[str, StaticRanges]:
        """How the runtime will quantize every int8 linear."""
        return {
            name: StaticRanges(
                both.input.magnitude,
                both.output.magnitude,
                both.input.clip,
                both.output.clip,
                self.quant_bias,
            )
            for name, both in self.scales.items()
            if name in self.quantized
        }


def quantized_linears(family: Family, *, vision: bool) -> list[Linear]:
    """The linears that become int8, in state-dict order."""
    return [
        linear
        for linear in family.linears.values()
        if linear.quantized and (vision or linear.tower == "language")
    ]


def choose_scales(
    family: Family,
    file: Scales,
    needed: Collection[str],
    threshold: float | None,
    *,
    clipped: bool = True,
) -> dict[str, LinearScales]:
    """Ranges and clip flags of every linear in a scales file.

    threshold None: everything clips, at the range that the file chose (unless clipped is false)
    or else at its maximum,
    and a group that reads one tensor has one input range. A number: mllm's own selection, left
    as mllm leaves it.
    Raises ModelError naming a needed linear without a scale, a linear that the model does not
    have, or one whose range is negative (mllm's signed maximum of an all-negative tensor).
    """
    for name in needed:
        if name not in file.sides:
            raise ModelError(
                "is to be quantized and has no activation scale",
                tensor=name,
                remedy="Profile with samples that reach it (images reach the vision tower), or "
                "set vision: false.",
            )
    for name in file.sides:
        if name not in family.linears:
            raise ModelError(
                "has a scale, and is no linear of this model",
                tensor=name,
                remedy="The scales are of another model.",
            )
    chosen = {
        name: LinearScales(
            _choose(name, "input", sides[0], threshold, clipped),
            _choose(name, "output", sides[1], threshold, clipped),
        )
        for name, sides in file.sides.items()
    }
    return chosen if threshold is not None else _grouped(family, chosen)


def shadowed(
    scales: Mapping[str, LinearScales], file: Scales, layers: int
) -> dict[str, LinearScales]:
    """The scales with the `layers` down_projs as shadow layers that are worth most.

    Both sides are left unclipped, at the ranges that serve the bulk of the values. Raises
    ModelError where the scales file has no shadow ranges.
    """
    if not file.shadows:
        raise ModelError(
            "no linear has shadow ranges in the scales file",
            remedy="Take the scales with clipping for kind down, and a target where it has 8 bits.",
        )
    best = sorted(file.shadows, key=lambda name: -file.shadows[name].gain)[:layers]
    chosen = dict(scales)
    for name in best:
        ranges = file.shadows[name]
        chosen[name] = LinearScales(
            ActivationScale(ranges.input, clip=False), ActivationScale(ranges.output, clip=False)
        )
    return chosen


def int8_entries(
    tensors: TensorSource, names: Sequence[str], layout: Int8Layout
) -> list[TensorEntry]:
    """The table of int8.pth for the given tensors."""
    entries = []
    for name in names:
        linear, _, part = name.rpartition(".")
        shape, dtype = tensors.shape(name), torch.float32
        if linear in layout.quantized and part == "weight":
            rows, columns = shape
            entries.append(TensorEntry(name, torch.int8, (columns, rows), (1, columns)))
        else:
            whole = layout.quant_bias and linear in layout.quantized
            entries.append(TensorEntry(name, torch.int32 if whole else dtype, shape))
        if entries[-1].dtype != dtype:
            entries.append(TensorEntry(f"{name}.scale", dtype, ()))
    return entries + [
        TensorEntry(name, value.dtype, ()) for name, value in _scale_tensors(layout.scales)
    ]


def write_int8(
    path: str | PathLike[str],
    tensors: TensorSource,
    names: Sequence[str],
    layout: Int8Layout,
    rounded: Callable[[str], Rounded | None] | None = None,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> None:
    """Write int8.pth, one tensor in memory at a time. Equal inputs give equal bytes.

    rounded: linear -> its weight where another method than rounding to nearest made it; asked
    for in the order of `names`. layout.correct_bias: its bias takes what the rounding took away.
    """
    entries = int8_entries(tensors, names, layout)
    table = {entry.name: entry.dtype for entry in entries}
    with StateDictWriter(path, entries) as writer:
        for done, name in enumerate(names):
            progress(done, len(names), "tensors")
            linear, _, part = name.rpartition(".")
            own = rounded(linear) if rounded and linear in layout.quantized else None
            corrected = own is not None and layout.correct_bias and part == "bias"
            if table[name] == torch.float32 and not corrected:
                copy_tensor(tensors, name, writer)
                continue
            if table[name] == torch.int8:
                made = quantize_weight(tensors.read(name), name=name) if own is None else own.weight
                writer.write(name, made.values.t())
                writer.write(f"{name}.scale", made.scale)
            else:
                bias = tensors.read(name)
                bias = bias + own.bias if own is not None and corrected else bias
                _write_bias(name, bias, table[name], writer)
            tensors.release(name)
        for name, value in _scale_tensors(layout.scales):
            writer.write(name, value)
    progress(len(names), len(names), "tensors")


def _write_bias(name: str, bias: Tensor, dtype: torch.dtype, writer: StateDictWriter) -> None:
    if dtype == torch.float32:
        writer.write(name, bias)
        return
    made = quantize_bias(bias, name=name)
    writer.write(name, made.values)
    writer.write(f"{name}.scale", made.scale)


def _scale_tensors(scales: Mapping[str, LinearScales]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, both in scales.items():
        yield f"{name}.input_scale", torch.tensor(both.input.magnitude, dtype=torch.float32)
        yield f"{name}.output_scale", torch.tensor(both.output.magnitude, dtype=torch.float32)
        yield f"{name}.clip_input", torch.tensor(both.input.clip)
        yield f"{name}.clip_output", torch.tensor(both.output.clip)


def _choose(
    name: str, side: str, found: Side, threshold: float | None, clipped: bool
) -> ActivationScale:
    kept = found.clipped is None or threshold is not None or not clipped
    largest = found.ori if kept or found.clipped is None else found.clipped
    chosen = choose_scale(largest, found.top_0_1, threshold=threshold)
    if chosen.magnitude < 0:
        raise ModelError(
            f"the range of its {side} is {chosen.magnitude}, which is negative",
            tensor=name,
            remedy="Take the scales with statistics: absmax.",
        )
    return ActivationScale(max(chosen.magnitude, SMALLEST_RANGE), chosen.clip)


def _grouped(family: Family, chosen: Mapping[str, LinearScales]) -> dict[str, LinearScales]:
    present = [group for group in family.groups if all(name in chosen for name in group)]
    shared = share_scales({name: both.input.magnitude for name, both in chosen.items()}, present)
    return {
        name: LinearScales(ActivationScale(shared[name], both.input.clip), both.output)
        for name, both in chosen.items()
    }
