"""Statistics of what every linear of a model reads and writes, over samples.

Nothing that passes is kept but the running statistics. Outputs are observed before the bias is
added, because that is where the runtime quantizes them (mllm's `no_bias`). `profile` runs a
module that is in memory whole; `profile_layers` does the same with one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from buildsys.models.family import Family, Linear
from buildsys.models.key_layout import to_classic
from buildsys.models.runtime import hidden_states
from buildsys.models.samples import Samples
from buildsys.quant.observers import Mode, Observer, Statistics

# Logits that exist at a time, tokens x rows of the head: 2 MiB, which the cache holds until
# their statistics are taken.
HEAD_TOKENS, HEAD_ROWS = 256, 2048

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class LinearStatistics:
    """What one linear read and wrote over all samples."""

    input: Statistics
    output: Statistics


@dataclass(frozen=True)
class Sizes:
    """How many vectors all samples have together: tokens, and patches of the vision tower."""

    tokens: int
    patches: int


@dataclass
class Observers:
    """The running statistics of linears; `order` is that of first execution.

    A tensor that a group of linears reads is observed at the first of them only.
    """

    family: Family
    mode: Mode
    no_bias: bool
    sizes: Sizes
    order: list[str] = field(default_factory=list)
    inputs: dict[str, Observer] = field(default_factory=dict)
    outputs: dict[str, Observer] = field(default_factory=dict)

    def see_input(self, linear: Linear, x: Tensor) -> None:
        """What a linear is about to read; its group's other linears read the same."""
        if linear.name == self.family.group_of[linear.name][0]:
            self._of(self.inputs, linear, linear.shape[1]).update(x)

    def see_output(self, linear: Linear, y: Tensor) -> None:
        if linear.name not in self.outputs:
            self.order.append(linear.name)
        self._of(self.outputs, linear, linear.shape[0]).update(y)

    def results(self) -> dict[str, LinearStatistics]:
        """Every linear that was seen. QuantError, naming it, where its values are not finite."""
        inputs = {name: seen.result(f"{name} input") for name, seen in self.inputs.items()}
        return {
            name: LinearStatistics(
                inputs[self.family.group_of[name][0]],
                self.outputs[name].result(f"{name} output"),
            )
            for name in self.order
        }

    @cached_property
    def _many(self) -> int:
        """Values that the whole model's linears read and write in this run."""
        linears = [linear for linear in self.family.linears.values() if linear.observed]
        return sum(self._vectors(linear) * sum(linear.shape) for linear in linears)

    def _vectors(self, linear: Linear) -> int:
        return self.sizes.patches if linear.tower == "vision" else self.sizes.tokens

    def _of(self, observers: dict[str, Observer], linear: Linear, features: int) -> Observer:
        if linear.name not in observers:
            expected = self._vectors(linear) * features
            observers[linear.name] = Observer(self.mode, expected=expected, many=self._many)
        return observers[linear.name]


def profile(
    family: Family,
    module: nn.Module,
    samples: Sequence[Samples],
    *,
    mode: Mode = "absmax",
    no_bias: bool = True,
    progress: Progress = lambda done, total, unit: None,
) -> dict[str, LinearStatistics]:
    """Statistics of every linear that the samples reach, in order of first execution.

    module: `runtime.load_module`'s, in float32. Linears that no sample reaches (the vision
    tower under text alone) are not in the result. progress counts tokens.
    """
    sizes = sizes_of(samples)
    observers = Observers(family, mode, no_bias, sizes)
    whole: Any = module
    done = 0
    with hooked(linears_in(module, "", family), observers):
        for part in samples:
            for sample in part:
                hidden = hidden_states(module, sample)
                observers.see_input(family.head, hidden)
                see_logits(observers, whole.lm_head.weight, hidden)
                done += sample.input_ids.shape[1]
                progress(done, sizes.tokens, "tokens")
    return observers.results()


def sizes_of(samples: Sequence[Samples]) -> Sizes:
    """Tokens and patches of all samples, without making them."""
    lengths = [length for part in samples for length in part.lengths()]
    return Sizes(sum(each.tokens for each in lengths), sum(each.patches for each in lengths))


@torch.inference_mode()
def logit_blocks(weight: Tensor, hidden: Tensor) -> Iterator[Tensor]:
    """The products of hidden [n, in] with rows of the head [rows, in], block by block."""
    for rows in torch.split(weight, HEAD_ROWS):
        for tokens in torch.split(hidden, HEAD_TOKENS):
            yield functional.linear(tokens, rows)


@torch.inference_mode()
def see_logits(
    observers: Observers,
    weight: Tensor,
    hidden: Tensor,
    also: Callable[[Tensor], None] | None = None,
) -> None:
    """Observe the head's outputs for hidden [n, in] and some rows of its weight."""
    for block in logit_blocks(weight, hidden):
        observers.see_output(observers.family.head, block)
        if also is not None:
            also(block)


def linears_in(part: nn.Module, name: str, family: Family) -> Iterator[tuple[nn.Linear, Linear]]:
    """The linears in a module of that classic name ("": the whole) that statistics list; the
    head is run in blocks, and is not among them."""
    for path, child in part.named_modules():
        linear = family.linears.get(to_classic(".".join(filter(None, (name, path)))))
        if linear is not None and linear.observed and linear is not family.head:
            assert isinstance(child, nn.Linear)
            yield child, linear


@contextmanager
def hooked(linears: Iterable[tuple[nn.Linear, Linear]], observers: Observers) -> Iterator[None]:
    """These linears report to `observers` while the context lasts."""
    handles = [
        child.register_forward_hook(_reporter(observers, linear)) for child, linear in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reporter(observers: Observers, linear: Linear) -> Callable[[Any, Any, Any], None]:
    def report(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observers.see_input(linear, inputs[0])
        if observers.no_bias and module.bias is not None:
            output = output if output.dtype is torch.float32 else output.to(torch.float32)
            output = output - module.bias
        observers.see_output(linear, output)

    return report
