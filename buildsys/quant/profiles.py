"""What mllm v1's runtime does with each linear: bit widths, shared quantizers, shadow layers.

A profile is named by `target`. Source: mllm v1's modeling files and NPU ops, written down in
one table here because the checkpoint itself does not carry widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from buildsys.quant.errors import QuantError


@dataclass(frozen=True)
class Profile:
    """The numeric contract of one runtime.

    bits: kind of linear (the last part of its name) -> width of its input and its output.
    shadow_bits: the width of a kind inside a shadow layer, which the CPU repairs there.
    shared_inputs: kinds that read one quantizer, so must have equal input scales.
    bias_added: kinds whose float bias is added after the output is dequantized.
    fp16_outputs: kinds whose output is dequantized to float16: products stay below 65,504.
    """

    name: str
    bits: Mapping[str, int]
    shadow_bits: Mapping[str, int]
    shared_inputs: tuple[tuple[str, ...], ...]
    bias_added: frozenset[str]
    fp16_outputs: frozenset[str]

    def width(self, linear: str, *, shadow: bool = False) -> int | None:
        """Bits of a linear's input and output by its name; None where it stays in float."""
        kind = linear.rsplit(".", 1)[-1]
        if shadow and kind in self.shadow_bits:
            return self.shadow_bits[kind]
        return self.bits.get(kind)


_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


def _language(name: str, down_bits: int, fp16_outputs: frozenset[str]) -> Profile:
    bits = {**dict.fromkeys(_QKV, 16), "o_proj": 8, **dict.fromkeys(_GATE_UP, 8)}
    return Profile(
        name,
        bits=MappingProxyType({**bits, "down_proj": down_bits}),
        shadow_bits=MappingProxyType({"down_proj": 8}),
        shared_inputs=(_QKV, _GATE_UP),
        bias_added=frozenset(_QKV),
        fp16_outputs=fp16_outputs,
    )


_VIT_KINDS = ("qkv", "proj", "fc1", "fc2")

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            _language("mllm-v1-text", 16, frozenset(_GATE_UP)),
            _language("mllm-v1-vl", 8, frozenset()),
            Profile(
                "mllm-v1-vit",
                bits=MappingProxyType(dict.fromkeys(_VIT_KINDS, 16)),
                shadow_bits=MappingProxyType({}),
                shared_inputs=(),
                bias_added=frozenset(_VIT_KINDS),
                fp16_outputs=frozenset(),
            ),
        )
    }
)


def profile(name: str) -> Profile:
    """The profile of that name, or a QuantError with the names there are."""
    if name not in PROFILES:
        raise QuantError(f"target: {name!r} is unknown; use one of {', '.join(PROFILES)}")
    return PROFILES[name]


def fake_quantize(x: Tensor, magnitude: float, bits: int) -> Tensor:
    """x as a signed quantizer of `bits` bits and range `magnitude` would pass it on.

    s = magnitude / (2^(bits-1) - 1); s * clamp(round(x / s), -2^(bits-1), 2^(bits-1) - 1), half
    to even, in x's type and shape. Outputs of a linear are passed through it before the bias is
    added. Raises QuantError for a range that is not positive (an all-negative tensor under
    mllm's signed maximum).
    """
    top = 2 ** (bits - 1) - 1
    scale = magnitude / top
    if not scale > 0.0:
        raise QuantError(f"activation range {magnitude} is not positive; use statistics: absmax")
    levels: Tensor = x / scale
    return levels.round_().clamp_(-top - 1, top).mul_(scale)
