"""Which graphs a model is cut into, so that each fits the compiler's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from buildsys.models.graph.encodings import Kind, mask_depth
from buildsys.models.graph.graph import Graph
from buildsys.models.graph.language import language_graph, layer_sizes
from buildsys.models.graph.quantized import QuantizedGraph, quantized_graph
from buildsys.models.graph.vision import vision_graph

if TYPE_CHECKING:
    from buildsys.models.graph.ranges import Ranges
    from buildsys.models.open import Model
    from buildsys.plan.graph import Json

Part = Literal["language", "vision"]
# Of what linears read and write.
KINDS: Mapping[str, Kind] = {"A16W8": "uint16", "A8W8": "uint8"}


@dataclass(frozen=True)
class Cut:
    """A model and the sizes that its graphs have. tensors: names that its checkpoint has. chunk,
    past: tokens of a language graph, and of the chunks before it; patches: of a vision graph."""

    model: Model
    tensors: frozenset[str]
    chunk: int
    past: int
    patches: int


@dataclass(frozen=True)
class Piece:
    """One graph of a part, and which layers (vision: blocks) it has."""

    part: Part
    layers: tuple[int, ...]
    quantized: QuantizedGraph

    @property
    def graph(self) -> Graph:
        return self.quantized.graph

    @property
    def name(self) -> str:
        return self.graph.name


def pieces_of(cut: Cut, ranges: Ranges, options: Mapping[str, Json]) -> tuple[Piece, ...]:
    """The vision encoder's graphs, then the language model's, in order of execution.

    Raises ModelError for a tensor without a range."""
    parts: list[tuple[Part, Sequence[tuple[tuple[int, ...], Graph]]]] = []
    if options["vision"] and cut.model.config.vision is not None:
        parts.append(("vision", list(_vision(cut, options["blocks_per_graph"]))))
    parts.append(("language", list(_language(cut, options["layers_per_graph"]))))
    kind, per_channel = KINDS[options["precision"]], options["weights"] == "per-channel"
    found = []
    for part, graphs in parts:
        # One mask for all graphs of a part.
        depth = mask_depth(tuple(graph for _, graph in graphs), ranges)
        for layers, graph in graphs:
            made = quantized_graph(graph, ranges, kind, per_channel=per_channel, depth=depth)
            found.append(Piece(part, layers, made))
    return tuple(found)


def _language(cut: Cut, length: int) -> Iterator[tuple[tuple[int, ...], Graph]]:
    for number, layers in enumerate(_runs(cut.model.config.num_hidden_layers, length)):
        name = f"language_{number}"
        yield layers, language_piece(cut, name, layers, chunk=cut.chunk, past=cut.past)


def language_piece(cut: Cut, name: str, layers: tuple[int, ...], *, chunk: int, past: int) -> Graph:
    """Some layers, of any chunk; the last layer brings the last norm with it."""
    config = cut.model.config
    final = layers[-1] == config.num_hidden_layers - 1
    return language_graph(name, layer_sizes(config), layers, chunk=chunk, past=past, final=final)


def _vision(cut: Cut, length: int | None) -> Iterator[tuple[tuple[int, ...], Graph]]:
    assert cut.model.config.vision is not None
    depth = cut.model.config.vision.depth
    for number, blocks in enumerate(_runs(depth, length or depth)):
        yield blocks, vision_piece(cut, f"vision_{number}", blocks, patches=cut.patches)


def vision_piece(cut: Cut, name: str, blocks: tuple[int, ...], *, patches: int) -> Graph:
    """Some blocks, of any number of patches; the first brings the patch embedding with it, the
    last the merger."""
    config = cut.model.config
    assert config.vision is not None
    return vision_graph(
        name,
        config,
        cut.tensors,
        patches=patches,
        blocks=blocks,
        embed=blocks[0] == 0,
        merger=blocks[-1] == config.vision.depth - 1,
    )


def _runs(count: int, length: int) -> Sequence[tuple[int, ...]]:
    return [tuple(range(at, min(at + length, count))) for at in range(0, count, length)]
