"""A language model whose rotation can be differentiated: R1 and R2 inside torch's graph.

The master weights (norms folded, not turned) stay as they are. `turn` computes the turned,
quantized weights of a rotation; `run` sends a sample through transformers' own layers with them,
every linear between the quantizers of its profile, with the range of each at the maximum over the
sample. Embedding and head are float: there the states are turned in place of the tables.
Source: SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from buildsys.models.key_layout import to_classic
from buildsys.models.layer_walk import replace_module
from buildsys.models.rotated import rotated_tensors
from buildsys.models.runtime import hidden_states, load_module, position_ids
from buildsys.quant.profiles import profile
from buildsys.quant.straight_through import (
    narrow_product,
    product,
    quantize_activation,
    quantize_weight_through,
)

if TYPE_CHECKING:
    from buildsys.models.family import Linear
    from buildsys.models.open import Model
    from buildsys.models.samples import Sample


# Logits that exist at a time (in float32, and four times so many numbers in between).
LOGITS = 1 << 24


@dataclass(frozen=True)
class FloatRun:
    """What the float model makes of a sample, in the basis that is not turned.

    embeddings: the first layer's input [n, hidden], images included. positions: as the layers
    take them. final: the head's input [n, hidden].
    """

    embeddings: Tensor
    positions: Tensor
    final: Tensor


@dataclass(frozen=True)
class Turns:
    """R1 [hidden, hidden] and the R2 of every layer [layers, head_dim, head_dim], in float32,
    or float64 for exact results. In float32 the products are narrow: a bfloat16 is within a
    quarter of an int8 level of the largest weight, and far nearer to the others."""

    R1: Tensor
    R2: Tensor

    def of(self, linear: Linear, W: Tensor) -> Tensor:
        """The weight [out, in] turned on both sides."""
        if linear.input_turn is not None:
            R = self._matrix(linear.input_turn.matrix, linear.input_turn.index)
            W = product(W.reshape(-1, len(R)), R.T, narrow=True).reshape(W.shape)
        if linear.output_turn is not None:
            R = self._matrix(linear.output_turn.matrix, linear.output_turn.index)
            shape, columns = W.shape, W.reshape(-1, len(R), W.shape[1]).mT
            W = product(columns.reshape(-1, len(R)), R.T, narrow=True)
            W = W.reshape(columns.shape).mT.reshape(shape)
        return W

    def of_bias(self, linear: Linear, bias: Tensor) -> Tensor:
        """The bias [out] turned with the outputs."""
        if linear.output_turn is None:
            return bias
        R = self._matrix(linear.output_turn.matrix, linear.output_turn.index)
        return (bias.reshape(-1, len(R)) @ R).reshape(-1)

    def _matrix(self, matrix: str, index: int) -> Tensor:
        return self.R1 if matrix == "R" else self.R2[index]


class SharedInput:
    """The quantizer in front of the linears that read one tensor: it computes once for all."""

    def __init__(self, bits: int) -> None:
        self._bits, self.readers, self._left = bits, 0, 0
        self._seen: Tensor | None = None
        self._made: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x quantized; the readers come one after the other, with the same x."""
        if self._made is None or x is not self._seen:
            self._made, self._left = quantize_activation(x, self._bits), self.readers
            self._seen = x
        found = self._made
        self._left -= 1
        if self._left == 0:
            self._seen = self._made = None
        return found


class TurnedLinear(nn.Module):
    """A linear between two quantizers, with the weight that the last `turn` gave it.

    master, master_bias: not turned. weight, bias: leaves that collect the gradients of all
    samples of a step. quantized: their source in the rotation's graph.
    """

    def __init__(
        self, child: nn.Linear, linear: Linear, bits: int, before: SharedInput, rounds: bool
    ) -> None:
        super().__init__()
        self.linear, self.bits, self._before, self._rounds = linear, bits, before, rounds
        before.readers += 1
        self.master = child.weight.detach()
        self.master_bias = None if child.bias is None else child.bias.detach()
        self.weight, self.bias = self.master, self.master_bias
        self.turned: list[tuple[Tensor, Tensor]] = []

    def turn(self, turns: Turns) -> None:
        """Take the weight and the bias of a rotation; the sums of products are the turns' type,
        the results float32."""
        W = turns.of(self.linear, self.master.to(turns.R1.dtype)).to(torch.float32)
        W = quantize_weight_through(W) if self._rounds else W
        self.weight = W.detach().requires_grad_(W.requires_grad)
        self.turned = [(W, self.weight)]
        if self.master_bias is not None:
            b = turns.of_bias(self.linear, self.master_bias.to(turns.R1.dtype)).to(torch.float32)
            self.bias = b.detach().requires_grad_(b.requires_grad)
            self.turned.append((b, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; see `simulate.StaticLinear`."""
        y = product(self._before(x), self.weight)
        y = quantize_activation(y, self.bits)
        return y if self.bias is None else y + self.bias


class _Recomputed(nn.Module):
    """A layer of which only the input is kept; backward runs it again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(*inputs, **named)
        return checkpoint(
            self.layer, *inputs, use_reentrant=False, preserve_rng_state=False, **named
        )


class TurnedLanguage:
    """The language model of a checkpoint as a function of its rotation.

    Memory: the whole model in float32, and while a gradient is taken three times its
    decoder layers more.
    """

    def __init__(
        self, model: Model, target: str, samples: Iterable[Sample], *, rounds: bool = True
    ) -> None:
        """target: the runtime's profile. samples: what will be run. rounds: the weights are int8
        too, rounded to the nearest; false leaves them float, as before GPTQ."""
        module: Any = load_module(model, rotated_tensors(model, fuse=True))
        backbone: Any = module.model
        self._language: Any = getattr(backbone, "language_model", backbone)
        self.runs = [float_run(module, self._language.layers[0], each) for each in samples]
        self.head: Tensor = module.lm_head.weight
        self.linears: list[TurnedLinear] = []
        contract, inputs = profile(target), dict[str, SharedInput]()
        for name, child in list(module.named_modules()):
            linear = model.family.linears.get(to_classic(name))
            if linear is None or linear.tower != "language" or not linear.quantized:
                continue
            bits = contract.width(linear.name)
            assert isinstance(child, nn.Linear)
            assert bits is not None  # a language profile names every kind of linear
            before = inputs.setdefault(model.family.group_of[linear.name][0], SharedInput(bits))
            self.linears.append(TurnedLinear(child, linear, bits, before, rounds))
            replace_module(module, name, self.linears[-1])
        self._language.embed_tokens = nn.Identity()  # its states are in the runs
        self._language.layers = nn.ModuleList(_Recomputed(one) for one in self._language.layers)

    def turn(self, turns: Turns) -> None:
        """Compute all weights of a rotation."""
        for linear in self.linears:
            linear.turn(turns)

    def run(self, turns: Turns, sample: FloatRun) -> Tensor:
        """The head's input [n, hidden] in the basis that is not turned; after `turn`."""
        R1 = turns.R1.to(torch.float32)
        state = self._language(
            inputs_embeds=(sample.embeddings @ R1)[None],
            position_ids=sample.positions,
            use_cache=False,
        ).last_hidden_state[0]
        found: Tensor = state @ R1.T
        return found

    def collect(self) -> None:
        """Send what the weights have collected on to the rotation, and let the graph go."""
        made, gradients = [], []
        for linear in self.linears:
            for source, leaf in linear.turned:
                if leaf.grad is not None:
                    made.append(source)
                    gradients.append(leaf.grad)
            linear.turned = []
        torch.autograd.backward(made, gradients)


def float_run(module: nn.Module, first_layer: nn.Module, sample: Sample) -> FloatRun:
    """Run the float module over a sample."""
    seen: list[Tensor] = []
    handle = first_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    try:
        final = hidden_states(module, sample)
    finally:
        handle.remove()
    # Copies: what inference mode has made cannot take part in a gradient.
    return FloatRun(seen[0].clone(), position_ids(module, sample), final.clone())


def head_parts(count: int, tokens: int) -> Iterator[slice]:
    """Runs of at most `tokens` positions: logits are large."""
    return (slice(start, min(start + tokens, count)) for start in range(0, count, tokens))


@torch.no_grad()
def kl_and_gradient(head: Tensor, found: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Mean KL (nats) of the next tokens' distribution to the float model's, and its gradient.

    head [vocab, hidden]; found, wanted: the head's inputs [n, hidden]. The gradient is by
    `found`, in closed form: (softmax(found) - softmax(wanted)) head / n.
    """
    gradient, total = torch.empty_like(found), 0.0
    for part in head_parts(len(found), max(1, LOGITS // len(head))):
        ours = functional.log_softmax(found[part] @ head.T, dim=-1)
        theirs = functional.log_softmax(wanted[part] @ head.T, dim=-1)
        p = theirs.exp()
        total += float((p * (theirs - ours)).sum(dtype=torch.float64))
        gradient[part] = narrow_product((ours.exp_() - p) / len(found), head)
    return total / len(found), gradient
