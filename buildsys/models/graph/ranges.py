"""The range of every tensor of a graph: its smallest and largest value over all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from buildsys.models.errors import ModelError
from buildsys.models.graph.graph import Graph
from buildsys.models.graph.language import COS, MASK, SIN

Ranges = Mapping[str, tuple[float, float]]


@dataclass
class RangeObserver:
    """Running minimum and maximum under the names of a graph's ranges. cos, sin and the mask have
    none of their own: those end at 1, and the depth of the mask follows from the scores."""

    seen: dict[str, tuple[float, float]] = field(default_factory=dict)

    def of(self, graph: Graph) -> Callable[[str, Tensor], Tensor]:
        """What `evaluate` shows the graph's tensors to."""

        def see(name: str, x: Tensor) -> Tensor:
            kept = graph.ranges[name]
            if kept not in (COS, SIN, MASK) and not kept.endswith(".masked"):
                self.update(kept, x)
            return x

        return see

    def update(self, name: str, x: Tensor) -> None:
        """Take in the values of x. Raises ModelError where they are not finite."""
        if not x.numel():
            return
        low, high = (float(value) for value in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelError("activations are not finite; check the checkpoint", tensor=name)
        before = self.seen.get(name, (math.inf, -math.inf))
        self.seen[name] = min(low, before[0]), max(high, before[1])
