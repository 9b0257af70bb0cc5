"""A graph with the encodings of all its tensors, ready for HTP, and its simulation.

HTP multiplies 16-bit activations by 8-bit ones: of two 16-bit activations onnxruntime-qnn makes
the second uint8 without a word (40 dB). Here every such product is written out as two exact ones:
y = a hi + a lo, with b = hi + lo, both int8 and symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from buildsys.models.graph.encodings import (
    Encoding,
    Kind,
    QuantizedWeight,
    encodings_of,
    quantize_weight,
)
from buildsys.models.graph.evaluate import evaluate
from buildsys.models.graph.graph import Graph, Node
from buildsys.models.graph.ranges import Ranges

# Steps of 16 bits that are one of `hi`, so that its 254 steps reach further than any value; the
# rest, half of them either way and a rounding, in steps of `lo`.
HI_STEP = 258
LO_STEP = 130 / 127

ReadWeight = Callable[[Node], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class QuantizedGraph:
    """graph: products of two activations written out. encodings: of every tensor."""

    graph: Graph
    encodings: Mapping[str, Encoding]
    per_channel: bool

    def weight(self, node: Node, read: ReadWeight) -> QuantizedWeight:
        """A linear's weight and bias in whole numbers."""
        weight, bias = read(node)
        scale = self.encodings[node.inputs[0]].scale
        return quantize_weight(weight, bias, scale, per_channel=self.per_channel)

    def simulate(self, feeds: Mapping[str, Tensor], read: ReadWeight) -> dict[str, Tensor]:
        """The outputs as integer arithmetic without error between the quantizers gives them;
        float32, dequantized."""
        return evaluate(
            self.graph,
            feeds,
            lambda node: self.weight(node, read).floats(),
            lambda name, x: self.encodings[name].fake(x),
        )


def quantized_graph(
    graph: Graph,
    ranges: Ranges,
    linears: Kind = "uint16",
    *,
    per_channel: bool,
    depth: float | None = None,
) -> QuantizedGraph:
    """The graph with 16-bit activations; linears: the kind of what linears read and write.
    Raises ModelError for a missing range."""
    narrow = encodings_of(graph, ranges, linears, depth)
    graph, encodings = _written_out(graph, encodings_of(graph, ranges, "uint16", depth))
    if linears != "uint16":
        graph, encodings = _with_linears(graph, encodings, narrow)
    return QuantizedGraph(graph, encodings, per_channel)


def _with_linears(
    graph: Graph, encodings: dict[str, Encoding], narrow: Mapping[str, Encoding]
) -> tuple[Graph, dict[str, Encoding]]:
    """Conversions before and behind every linear; linears that read one tensor share the first.
    The residual stream, norms, attention and what comes from outside stay as they are."""
    nodes: list[Node] = []
    shapes, names, made = dict(graph.shapes), dict(graph.ranges), dict(encodings)

    def add(node: Node, like: str, encoding: Encoding) -> None:
        nodes.append(node)
        shapes[node.output], names[node.output] = shapes[like], node.output
        made[node.output] = encoding

    for node in graph.nodes:
        if node.op != "linear":
            nodes.append(node)
            continue
        (x,), y = node.inputs, node.output
        if f"{x}.narrow" not in made:
            add(Node("convert", (x,), f"{x}.narrow"), x, narrow[x])
        product = replace(node, inputs=(f"{x}.narrow",), output=f"{y}.narrow_product")
        add(product, y, narrow[y])
        nodes.append(Node("convert", (product.output,), y))
    return replace(graph, nodes=tuple(nodes), shapes=shapes, ranges=names), made


def _written_out(graph: Graph, encodings: dict[str, Encoding]) -> tuple[Graph, dict[str, Encoding]]:
    """Every product of activations as the sum of two with 8-bit second operands."""
    nodes: list[Node] = []
    shapes, ranges = dict(graph.shapes), dict(graph.ranges)
    made = dict(encodings)
    for node in graph.nodes:
        if node.op != "matmul":
            nodes.append(node)
            continue
        operand = node.inputs[1]
        for each, encoding in _parts(node, made[operand], made[node.output]):
            nodes.append(each)
            if each.output != node.output:
                like = node.output if each.op == "matmul" else operand
                shapes[each.output], ranges[each.output] = shapes[like], each.output
            made[each.output] = encoding
    return replace(graph, nodes=tuple(nodes), shapes=shapes, ranges=ranges), made


def _parts(node: Node, operand: Encoding, output: Encoding) -> list[tuple[Node, Encoding]]:
    a, b = node.inputs
    y, step = node.output, operand.scale
    hi, lo = f"{y}.hi", f"{y}.lo"
    return [
        (Node("convert", (b,), hi), Encoding("int8", step * HI_STEP, 0)),
        (Node("convert", (hi,), f"{hi}.wide"), operand),
        (Node("sub", (b, f"{hi}.wide"), f"{lo}.wide"), operand),
        (Node("convert", (f"{lo}.wide",), lo), Encoding("int8", step * LO_STEP, 0)),
        (Node("matmul", (a, hi), f"{hi}.product"), output),
        (Node("matmul", (a, lo), f"{lo}.product"), output),
        (Node("add", (f"{hi}.product", f"{lo}.product"), y), output),
    ]
