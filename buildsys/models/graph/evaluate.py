"""Runs a graph in float32: the reference, the profile, and, with quantizers, the simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from buildsys.models.graph.graph import Graph, Node

Weights = Callable[[Node], tuple[Tensor, Tensor | None]]
Quantize = Callable[[str, Tensor], Tensor]


def _unchanged(name: str, x: Tensor) -> Tensor:
    return x


@torch.inference_mode()
def evaluate(
    graph: Graph, feeds: Mapping[str, Tensor], weights: Weights, see: Quantize = _unchanged
) -> dict[str, Tensor]:
    """The graph's outputs for inputs by name, in the graph's shapes.

    weights: a linear's node -> its weight [out, in] and bias. see: called with every tensor's
    name and value, inputs included; what it returns is passed on (fake quantization), so that a
    tensor is quantized once and every reader has the same. A value is dropped behind its last
    reader.
    """
    last = {name: at for at, node in enumerate(graph.nodes) for name in node.inputs}
    values = {name: see(name, feeds[name]) for name in graph.inputs}
    for at, node in enumerate(graph.nodes):
        inputs = [values[name] for name in node.inputs]
        values[node.output] = see(node.output, _run(node, inputs, weights, graph))
        for name in set(node.inputs):
            if last[name] == at and name not in graph.outputs:
                del values[name]
    return {name: values[name] for name in graph.outputs}


def _run(node: Node, inputs: list[Tensor], weights: Weights, graph: Graph) -> Tensor:
    if node.op == "linear":
        weight, bias = weights(node)
        return functional.linear(inputs[0], weight, bias)
    if node.op == "reshape":
        return inputs[0].reshape(graph.shapes[node.output])
    return OPERATIONS[node.op](inputs, node.attributes)


def _norm(x: Tensor, epsilon: float, *, centred: bool) -> Tensor:
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def _second(inputs: list[Tensor], attributes: Mapping[str, Any]) -> Tensor:
    """The second operand of a product: a tensor, or the node's number."""
    return inputs[1] if len(inputs) > 1 else torch.tensor(attributes["value"])


OPERATIONS: Mapping[str, Callable[[list[Tensor], Mapping[str, Any]], Tensor]] = {
    "rms_norm": lambda x, a: _norm(x[0], a["epsilon"], centred=False),
    "layer_norm": lambda x, a: _norm(x[0], a["epsilon"], centred=True),
    "add": lambda x, a: x[0] + x[1],
    "sub": lambda x, a: x[0] - x[1],
    "mul": lambda x, a: x[0] * _second(x, a),
    "matmul": lambda x, a: x[0] @ x[1],
    "softmax": lambda x, a: torch.softmax(x[0], a["axis"]),
    "sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "gelu": lambda x, a: functional.gelu(x[0]),
    "convert": lambda x, a: x[0],
    "transpose": lambda x, a: x[0].permute(a["order"]),
    "slice": lambda x, a: x[0].narrow(a["axis"], a["start"], a["stop"] - a["start"]),
    "concat": lambda x, a: torch.cat(x, a["axis"]),
}
