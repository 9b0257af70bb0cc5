"""The weights of a graph's linears, from any source of tensors in classic names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from buildsys.models.graph.graph import Node

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource


class LinearWeights:
    """Reads a linear's weight [out, in] and bias [out], float32, and holds them until `clear`."""

    def __init__(self, tensors: TensorSource) -> None:
        self._tensors = tensors
        self._held: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, node: Node) -> tuple[Tensor, Tensor | None]:
        if node.output not in self._held:
            self._held[node.output] = self._read(node.attributes)
        return self._held[node.output]

    def clear(self) -> None:
        """Let go of everything that was read."""
        self._held.clear()

    def _read(self, attributes: Any) -> tuple[Tensor, Tensor | None]:
        weight = self._part(attributes["weight"], attributes)
        bias = self._part(attributes["bias"], attributes) if "bias" in attributes else None
        # A convolution whose patches do not overlap is a linear.
        return weight.reshape(len(weight), -1), bias

    def _part(self, name: str, attributes: Any) -> Tensor:
        start, stop = attributes.get("rows", (0, self._tensors.shape(name)[0]))
        # A copy: the source may keep a tensor over a file until it is released.
        part = self._tensors.read(name)[start:stop].float().clone()
        if stop == self._tensors.shape(name)[0]:
            self._tensors.release(name)
        return part.mul_(attributes.get("gain", 1.0))
