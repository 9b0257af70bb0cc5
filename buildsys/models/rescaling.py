"""Factors for rescaling between two linears of a layer, on disk and on each linear.

A safetensors file, float64. By the name of down_proj, [intermediate]: up's row j is divided by
factor j, down's column j multiplied. By that of o_proj, [kv heads x head_dim]: the same of v
and o, whose query heads share the factors of their kv head. By that of k_proj, [kv heads x
head_dim]: k's rows are divided, q's multiplied; both halves of a RoPE pair have one factor.
These are exact. By the names of gate_proj and of up_proj, [intermediate]: their rows are divided,
which is close to nothing (`quant.gate_rows`), and only int8 is made that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from torch import Tensor

from buildsys.formats.ordered_writer import OrderedWriter
from buildsys.formats.safetensors_file import SafetensorsSource, SafetensorsWriter
from buildsys.formats.tensors import TensorEntry, TensorSource
from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Kind, Linear
from buildsys.quant.rescale import equal_peaks

PairKind = Literal["up-down", "v-o", "q-k", "gate-up"]
EXACT: tuple[PairKind, ...] = ("up-down", "v-o", "q-k")
PAIRS: tuple[PairKind, ...] = (*EXACT, "gate-up")
# By whose names the factors of a pair are kept. Rows of q are multiplied, rows of the others
# divided; columns are multiplied.
_KEPT_UNDER: Mapping[PairKind, tuple[Kind, ...]] = {
    "up-down": ("down",), "v-o": ("o",), "q-k": ("k",), "gate-up": ("gate", "up"),
}  # fmt: skip
ROWS_DIVIDED: tuple[Kind, ...] = ("up", "v", "k", "q", "gate")
_BY_PAIR: Mapping[PairKind, tuple[Kind, Kind]] = {
    "up-down": ("up", "down"), "v-o": ("v", "o"), "q-k": ("q", "k"), "gate-up": ("gate", "up"),
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """How the attention of one layer is divided: query heads, kv heads, the size of one."""

    queries: int
    keys: int
    size: int

    def shared(self, values: Tensor) -> Tensor:
        """By query head [queries x size] -> the largest of each kv head's [keys x size]."""
        by_head = values.view(self.keys, self.queries // self.keys, self.size)
        return by_head.amax(dim=1).reshape(-1)

    def spread(self, values: Tensor) -> Tensor:
        """By kv head [keys x size] -> for every query head that reads it [queries x size]."""
        by_head = values.view(self.keys, 1, self.size)
        return by_head.expand(-1, self.queries // self.keys, -1).reshape(-1)

    def paired(self, values: Tensor) -> Tensor:
        """The larger of both halves of each RoPE pair, for both [keys x size]."""
        halves = values.view(self.keys, 2, self.size // 2).amax(dim=1, keepdim=True)
        return halves.expand(-1, 2, -1).reshape(-1)


@dataclass(frozen=True)
class Layer:
    """The linears of one decoder layer by kind."""

    linears: Mapping[Kind, Linear]

    @property
    def heads(self) -> Heads:
        keys, queries = self.linears["v"].output_turn, self.linears["o"].input_turn
        assert keys is not None
        assert queries is not None
        return Heads(queries.blocks, keys.blocks, self.linears["v"].shape[0] // keys.blocks)

    def names_of(self, pair: PairKind) -> list[str]:
        """Under which names the pair's factors are kept."""
        return [self.linears[kind].name for kind in _KEPT_UNDER[pair]]

    def count(self, pair: PairKind) -> int:
        """How many factors the pair has."""
        first, second = _BY_PAIR[pair]
        return self.linears[second if pair == "q-k" else first].shape[0]


def layers_of(family: Family) -> list[Layer]:
    """The decoder layers in order."""
    found: dict[int, dict[Kind, Linear]] = {}
    for linear in family.linears.values():
        if linear.tower == "language" and linear.layer is not None:
            found.setdefault(linear.layer, {})[linear.kind] = linear
    return [Layer(found[index]) for index in sorted(found)]


def check_pairs(family: Family, pairs: Sequence[PairKind]) -> None:
    """ModelError where heads of q and k pass a norm of their own, which undoes any factor."""
    norms = [name for name in family.norms if name.endswith(("q_norm", "k_norm"))]
    if "q-k" in pairs and norms:
        raise ModelError(
            "normalizes what factors of q and k would change",
            tensor=norms[0],
            remedy="Leave q-k out of `pairs` for this model.",
        )


def balance_by_weights(
    family: Family,
    tensors: TensorSource,
    pairs: Sequence[PairKind],
    *,
    powers_of_two: bool,
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, factors) that make the largest weights on both sides equal, layer by layer; of
    EXACT pairs."""
    layers = layers_of(family)
    for done, layer in enumerate(layers):
        progress(done, len(layers), "layers")
        for pair in pairs:
            divided, multiplied = _peaks(layer, pair, tensors)
            [name] = layer.names_of(pair)
            yield name, equal_peaks(divided, multiplied, powers_of_two)
    progress(len(layers), len(layers), "layers")


def _peaks(layer: Layer, pair: PairKind, tensors: TensorSource) -> tuple[Tensor, Tensor]:
    """The largest weight that each factor divides, and that each multiplies."""
    found = []
    for kind in _BY_PAIR[pair]:
        name = layer.linears[kind].weight_name
        weights = tensors.read(name).abs()
        found.append(weights.amax(dim=1 if kind in ROWS_DIVIDED else 0).to(torch.float64))
        tensors.release(name)
    first, second = found
    if pair == "v-o":
        return first, layer.heads.shared(second)
    if pair == "q-k":
        return layer.heads.paired(second), layer.heads.paired(layer.heads.shared(first))
    return first, second


def factors_of_linears(rescale: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Factors by the names of a file -> by every linear that they act on, along its own axis.

    Rows of gate, up, v, k and q are divided by theirs, columns of down and o multiplied.
    Raises ModelError for a name that has no factors in this family, or a wrong length.
    """
    factors: dict[str, Tensor] = {}

    def also(name: str, s: Tensor) -> None:
        factors[name] = factors[name] * s if name in factors else s

    known: dict[str, tuple[Layer, PairKind]] = {}
    for layer in layers_of(family) if rescale else []:
        known |= {name: (layer, pair) for pair in PAIRS for name in layer.names_of(pair)}
    for name, s in rescale.items():
        found = known.get(name)
        if found is None or s.shape != (found[0].count(found[1]),):
            raise ModelError(
                f"factors of shape {list(s.shape)} belong to no linear of this model",
                tensor=name,
                remedy="Make the rescaling factors for this model.",
            )
        layer, pair = found
        first, second = (layer.linears[kind].name for kind in _BY_PAIR[pair])
        if pair == "gate-up":
            also(name, s)
        elif pair == "up-down":
            also(first, s)
            also(second, s)
        elif pair == "v-o":
            factors |= {first: s, second: layer.heads.spread(s)}
        else:
            factors |= {first: 1.0 / layer.heads.spread(s), second: s}
    return factors


def save_rescaling(
    path: str | PathLike[str],
    family: Family,
    pairs: Sequence[PairKind],
    factors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write the factors as they come: layer by layer, in the order of `pairs`."""
    entries = [
        TensorEntry(name, torch.float64, (layer.count(pair),))
        for layer in layers_of(family)
        for pair in pairs
        for name in layer.names_of(pair)
    ]
    writer: OrderedWriter = SafetensorsWriter(path, entries, metadata)
    with writer:
        for name, s in factors:
            writer.write(name, s)


def load_rescaling(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Names -> factors. Raises FormatError; sizes are checked where they are used."""
    source = SafetensorsSource(path)
    return {name: source.read(name).clone() for name in source.names()}


def exact_factors(rescale: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Those that change nothing in real numbers: without what `gate-up` has made."""
    close = {name for layer in layers_of(family) for name in layer.names_of("gate-up")}
    return {name: s for name, s in rescale.items() if name not in close}
