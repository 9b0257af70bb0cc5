"""Runs samples through a model and takes statistics of what every linear reads and writes.

One sample at a time, no activation is kept: memory is the model, one sample and the running
statistics. Outputs are observed before the bias is added, because that is where the runtime
quantizes them (mllm's `no_bias`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from buildsys.models.family import Family, Linear
from buildsys.models.key_layout import to_classic
from buildsys.models.runtime import hidden_states
from buildsys.models.samples import Samples
from buildsys.quant.observers import Mode, Observer, Statistics

# Tokens whose logits exist at a time: a vocabulary of 150,000 takes 40 MB for 64 tokens.
HEAD_TOKENS = 64

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class LinearStatistics:
    """What one linear read and wrote over all samples."""

    input: Statistics
    output: Statistics


@dataclass
class _Observers:
    """The running statistics of a profile; `order` is that of first execution.

    A tensor that a group of linears reads is observed at the first of them only.
    """

    family: Family
    mode: Mode
    no_bias: bool
    expected: Callable[[Linear], int]
    order: list[str] = field(default_factory=list)
    inputs: dict[str, Observer] = field(default_factory=dict)
    outputs: dict[str, Observer] = field(default_factory=dict)

    def observe(self, linear: Linear, module: nn.Linear, x: Tensor, y: Tensor) -> None:
        name, first = linear.name, self.family.group_of[linear.name][0]
        if name not in self.outputs:
            self.order.append(name)
            vectors = self.expected(linear)
            self.outputs[name] = Observer(self.mode, expected=vectors * linear.shape[0])
            if name == first:
                self.inputs[name] = Observer(self.mode, expected=vectors * linear.shape[1])
        if name == first:
            self.inputs[name].update(x)
        if self.no_bias and module.bias is not None:
            y = y - module.bias
        self.outputs[name].update(y)

    def results(self) -> dict[str, LinearStatistics]:
        inputs = {name: seen.result(f"{name} input") for name, seen in self.inputs.items()}
        return {
            name: LinearStatistics(
                inputs[self.family.group_of[name][0]],
                self.outputs[name].result(f"{name} output"),
            )
            for name in self.order
        }


def profile(
    family: Family,
    module: nn.Module,
    samples: list[Samples],
    *,
    mode: Mode = "absmax",
    no_bias: bool = True,
    progress: Progress = lambda done, total, unit: None,
) -> dict[str, LinearStatistics]:
    """Statistics of every linear that the samples reach, in order of first execution.

    module: `runtime.load_module`'s, in float32. Linears that no sample reaches (the vision
    tower under text alone) are not in the result. progress counts tokens.
    """
    lengths = [length for part in samples for length in part.lengths()]
    total = sum(length.tokens for length in lengths)
    patches = sum(length.patches for length in lengths)
    observers = _Observers(
        family, mode, no_bias, lambda linear: patches if linear.tower == "vision" else total
    )
    done = 0
    with _hooked(module, observers):
        for part in samples:
            for sample in part:
                run_head(module, hidden_states(module, sample))
                done += sample.input_ids.shape[1]
                progress(done, total, "tokens")
    return observers.results()


@torch.inference_mode()
def run_head(module: nn.Module, hidden: Tensor) -> None:
    head: Any = module.lm_head
    for part in torch.split(hidden, HEAD_TOKENS):
        head(part)


@contextmanager
def _hooked(module: nn.Module, observers: _Observers) -> Iterator[None]:
    """Every linear of the family reports to `observers` while the context lasts."""
    handles = []
    for name, child in module.named_modules():
        linear = observers.family.linears.get(to_classic(name))
        if linear is not None and linear.observed:
            assert isinstance(child, nn.Linear)
            handles.append(child.register_forward_hook(_reporter(observers, linear)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reporter(observers: _Observers, linear: Linear) -> Callable[[Any, Any, Any], None]:
    def report(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observers.observe(linear, module, inputs[0], output)

    return report
