"""A static graph as plain data: nodes over named tensors, with shapes.

A tensor's name is part of the contract: ranges are kept under it, and the inputs and outputs of
compiled graphs are called so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Op = Literal[
    "linear",
    "rms_norm",
    "layer_norm",
    "add",
    "sub",
    "mul",
    "matmul",
    "softmax",
    "sigmoid",
    "gelu",
    "convert",
    "reshape",
    "transpose",
    "slice",
    "concat",
]
# These move numbers and change none, so their outputs are quantized as their inputs are.
MOVES: frozenset[Op] = frozenset({"reshape", "transpose", "slice", "concat"})


@dataclass(frozen=True)
class Node:
    """output = op(inputs).

    attributes: "weight" (and "bias") of a linear: names in a checkpoint, with "gain", a factor
    of both, and "rows", (start, stop), the part of both that it is; "epsilon" of norms; "axis";
    "start" and "stop" of a slice; "order" of a transpose. `mul` may have "value", a number, for
    its second input.
    """

    op: Op
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in order of execution.

    inputs: in order. shapes: of every tensor. ranges: tensor -> the name that its range has;
    tensors that share a name are quantized alike. symmetric: names of ranges around zero.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    shapes: Mapping[str, tuple[int, ...]]
    ranges: Mapping[str, str]
    symmetric: frozenset[str]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that it reads, in order."""
        found: dict[str, None] = {}
        for node in self.nodes:
            for key in ("weight", "bias"):
                if key in node.attributes:
                    found[str(node.attributes[key])] = None
        return tuple(found)


class GraphBuilder:
    """Adds nodes one by one; every tensor gets its shape and the name of its range."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inputs: list[str] = []
        self._nodes: list[Node] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, str] = {}
        self._symmetric: set[str] = set()

    def input(self, name: str, shape: tuple[int, ...], *, range: str | None = None) -> str:  # noqa: A002 - the field's word
        """A tensor from outside."""
        self._inputs.append(name)
        return self._add(name, shape, range or name)

    def linear(self, x: str, linear: str, features: int, *, bias: bool, gain: float = 1.0) -> str:
        """x [rows, in] -> [rows, features], by a checkpoint's linear; its name is the output's."""
        attributes: dict[str, object] = {"weight": f"{linear}.weight"}
        if bias:
            attributes["bias"] = f"{linear}.bias"
        if gain != 1.0:
            attributes["gain"] = gain
        shape = (self._shapes[x][0], features)
        return self.node("linear", (x,), linear, shape, attributes=attributes)

    def elementwise(
        self,
        op: Op,
        inputs: tuple[str, ...],
        output: str,
        *,
        range: str | None = None,  # noqa: A002 - the field's word
        **attributes: object,
    ) -> str:
        """A node whose output has the shape of its first input."""
        return self.node(
            op, inputs, output, self._shapes[inputs[0]], range=range, attributes=attributes
        )

    def matmul(self, a: str, b: str, output: str) -> str:
        """[batch, n, k] x [batch, k, m]."""
        shape = (*self._shapes[a][:-1], self._shapes[b][-1])
        return self.node("matmul", (a, b), output, shape)

    def reshape(self, x: str, output: str, shape: tuple[int, ...]) -> str:
        assert math.prod(shape) == math.prod(self._shapes[x])
        return self.node("reshape", (x,), output, shape)

    def transpose(self, x: str, output: str, order: tuple[int, ...]) -> str:
        shape = tuple(self._shapes[x][axis] for axis in order)
        return self.node("transpose", (x,), output, shape, attributes={"order": order})

    def slice(self, x: str, output: str, axis: int, start: int, stop: int) -> str:
        shape = list(self._shapes[x])
        shape[axis] = stop - start
        part = {"axis": axis, "start": start, "stop": stop}
        return self.node("slice", (x,), output, tuple(shape), attributes=part)

    def concat(self, parts: tuple[str, ...], output: str, axis: int) -> str:
        """The parts must have one range."""
        assert len({self._ranges[part] for part in parts}) == 1
        shape = list(self._shapes[parts[0]])
        shape[axis] = sum(self._shapes[part][axis] for part in parts)
        return self.node("concat", parts, output, tuple(shape), attributes={"axis": axis})

    def node(
        self,
        op: Op,
        inputs: tuple[str, ...],
        output: str,
        shape: tuple[int, ...],
        *,
        range: str | None = None,  # noqa: A002 - the field's word
        attributes: Mapping[str, object] | None = None,
    ) -> str:
        """Add a node; its output has the range `range`, by default one of its own name."""
        kept = self._ranges[inputs[0]] if op in MOVES else output
        self._nodes.append(Node(op, inputs, output, attributes or {}))
        return self._add(output, shape, range or kept)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def around_zero(self, *names: str) -> None:
        """The ranges of these tensors are made symmetric."""
        self._symmetric.update(self._ranges[name] for name in names)

    def graph(self, outputs: tuple[str, ...]) -> Graph:
        """The graph with these outputs, in order."""
        return Graph(
            self._name,
            tuple(self._inputs),
            outputs,
            tuple(self._nodes),
            dict(self._shapes),
            dict(self._ranges),
            frozenset(self._symmetric),
        )

    def _add(self, name: str, shape: tuple[int, ...], range_name: str) -> str:
        assert name not in self._shapes, name
        self._shapes[name], self._ranges[name] = shape, range_name
        return name
