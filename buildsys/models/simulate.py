"""Static W8A8 as mllm's runtime computes it, simulated in float32 on transformers' module.

An int8 linear quantizes its input with a static range, multiplies with int8 weights, quantizes
the output with another static range, and then adds the float bias. Everything else (residual,
norms, RoPE, softmax, KV, head) is float32. Widths and shared quantizers are a profile's.
Source: mllm v1's modeling files and NPU ops, as written down in `quant.profiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from buildsys.models.errors import ModelError
from buildsys.models.family import Family, Linear
from buildsys.models.key_layout import to_classic
from buildsys.models.variant import StaticRanges, Variant
from buildsys.quant.profiles import Profile, fake_quantize, profile

# The linear whose quantizer a group reads: q_proj's for {q, k, v}, up_proj's for {gate, up}.
READERS = ("q", "up")
VISION_PROFILE = "mllm-v1-vit"

Shadow = Literal["flags", "none"]


@dataclass(frozen=True)
class Quantizers:
    """What stands before and behind one linear's product.

    input, output: ranges; bits: the width of both. repair_input, repair_output: a shadow op on
    the CPU makes up for what saturates there.
    """

    input: float
    output: float
    bits: int
    repair_input: bool = False
    repair_output: bool = False
    bias_before: bool = False


class StaticLinear(nn.Module):
    """A linear between two static quantizers."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, quantizers: Quantizers) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantizers = quantizers
        # Called with what the weights are multiplied with: x behind the quantizer, repaired
        # where it is.
        self.watch: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], float32."""
        q = self.quantizers
        seen = fake_quantize(x, q.input, q.bits)
        if self.watch is not None:
            self.watch(self._repaired(x, seen))
        product = functional.linear(seen, self.weight, self.bias if q.bias_before else None)
        y: Tensor = fake_quantize(product, q.output, q.bits)
        if q.repair_output:
            y = torch.where(_saturated(product, q.output, q.bits), product, y)
        if q.repair_input:
            lost = (x - seen).where(_saturated(x, q.input, q.bits), x.new_zeros(()))
            y = y + functional.linear(lost, self.weight)
        return y if self.bias is None or q.bias_before else y + self.bias

    def _repaired(self, x: Tensor, seen: Tensor) -> Tensor:
        q = self.quantizers
        return torch.where(_saturated(x, q.input, q.bits), x, seen) if q.repair_input else seen


def _saturated(x: Tensor, magnitude: float, bits: int) -> Tensor:
    """Where the quantizer is at its limit, which is how the shadow op finds what to repair."""
    top = 2 ** (bits - 1) - 1
    at_limit: Tensor = torch.round(x / (magnitude / top)).abs() >= top
    return at_limit


def simulate(
    module: nn.Module, family: Family, variant: Variant, target: str, shadow: Shadow = "flags"
) -> None:
    """Put the variant's static quantizers into a module that already has its weights.

    target: the language model's profile; the vision tower's is mllm-v1-vit. shadow: "flags"
    runs layers whose down_proj is not clipped as shadow layers, "none" lets them saturate, as
    mllm's stock "-rotated" configs do.
    """
    for name, child in list(module.named_modules()):
        linear = family.linears.get(to_classic(name))
        if linear is None or linear.name not in variant.ranges:
            continue
        assert isinstance(child, nn.Linear)
        quantizers = quantizers_of(linear, family, variant.ranges, target, shadow)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, StaticLinear(child, quantizers))


def shadow_layers(family: Family, ranges: Mapping[str, StaticRanges]) -> list[int]:
    """Layers whose down_proj has a clip flag off: the CPU repairs them, if the config says so."""
    return sorted(
        linear.layer
        for linear in _downs(family.linears.values())
        if linear.layer is not None and linear.name in ranges and _loose(ranges[linear.name])
    )


def _downs(linears: Iterable[Linear]) -> list[Linear]:
    return [linear for linear in linears if linear.kind == "down"]


def _loose(ranges: StaticRanges) -> bool:
    return not (ranges.clip_input and ranges.clip_output)


def quantizers_of(
    linear: Linear,
    family: Family,
    ranges: Mapping[str, StaticRanges],
    target: str,
    shadow: Shadow = "flags",
) -> Quantizers:
    """What stands around one int8 linear under a profile, as of `simulate`."""
    own = ranges[linear.name]
    contract = profile(VISION_PROFILE if linear.tower == "vision" else target)
    repaired = shadow == "flags" and linear.kind == "down" and _loose(own)
    return Quantizers(
        input=ranges[_reader(linear, family, ranges)].input,
        output=own.output,
        bits=_width(contract, linear, repaired),
        repair_input=repaired and not own.clip_input,
        repair_output=repaired and not own.clip_output,
        bias_before=own.bias_is_integer,
    )


def _width(contract: Profile, linear: Linear, repaired: bool) -> int:
    bits = contract.width(linear.name, shadow=repaired)
    if bits is None:
        raise ModelError(
            f"is int8, and profile {contract.name} does not quantize a {linear.kind}",
            tensor=linear.weight_name,
            remedy="Name the profile that the checkpoint was made for.",
        )
    return bits


def _reader(linear: Linear, family: Family, ranges: Mapping[str, StaticRanges]) -> str:
    """The linear whose input range the runtime uses for this one."""
    group = family.group_of[linear.name]
    readers = [name for name in group if family.linears[name].kind in READERS and name in ranges]
    return readers[0] if readers else linear.name
