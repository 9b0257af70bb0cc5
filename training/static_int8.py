"""A small simulation of static W8A8, to see what each kind of outlier breaks.

Per-tensor symmetric int8 weights; one static absmax scale for the input and one for the output
of every linear of the language model, from calibration samples; widths by runtime profile.
Outputs are quantized before the bias is added. The project's own quantizer lives elsewhere;
this one is kept apart and simple on purpose.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

# Bits of input and output per linear; "mllm-v1-text" differs in down_proj alone.
_WIDTHS = {
    "q_proj": 16,
    "k_proj": 16,
    "v_proj": 16,
    "o_proj": 8,
    "gate_proj": 8,
    "up_proj": 8,
    "down_proj": 8,
}
PROFILES = {"mllm-v1-vl": _WIDTHS, "mllm-v1-text": {**_WIDTHS, "down_proj": 16}}


@dataclass
class Range:
    """Largest magnitudes seen at a linear."""

    input: float = 0.0
    output: float = 0.0


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in _WIDTHS:
            yield name, module


def fake_quantize(x: torch.Tensor, absmax: float, bits: int) -> torch.Tensor:
    """Round to a symmetric grid of `bits` bits whose largest value is `absmax`; saturate."""
    top = 2 ** (bits - 1) - 1
    scale = max(absmax, 1e-12) / top
    quantized: torch.Tensor = torch.clamp(torch.round(x / scale), -top - 1, top) * scale
    return quantized


def observe(model: nn.Module, run: Callable[[], object]) -> dict[str, Range]:
    """Absmax of the input and of the output without bias of every linear while `run` runs."""
    ranges = {name: Range() for name, _ in _linears(model)}
    hooks = []
    for name, linear in _linears(model):

        def see(
            module: nn.Module,
            inputs: tuple[torch.Tensor, ...],
            output: torch.Tensor,
            seen: Range = ranges[name],
        ) -> None:
            bias = getattr(module, "bias", None)
            seen.input = max(seen.input, inputs[0].abs().max().item())
            plain = output if bias is None else output - bias
            seen.output = max(seen.output, plain.abs().max().item())

        hooks.append(linear.register_forward_hook(see))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


@contextmanager
def quantized(model: nn.Module, ranges: dict[str, Range], profile: str) -> Iterator[None]:
    """The model's language part computes as under `profile` inside the block."""
    widths = PROFILES[profile]
    for name, linear in _linears(model):
        bits, seen = widths[name.rsplit(".", 1)[-1]], ranges[name]
        weight = fake_quantize(linear.weight.data, linear.weight.abs().max().item(), 8)

        def forward(
            x: torch.Tensor,
            linear: nn.Linear = linear,
            weight: torch.Tensor = weight,
            seen: Range = seen,
            bits: int = bits,
        ) -> torch.Tensor:
            y = nn.functional.linear(fake_quantize(x, seen.input, bits), weight)
            y = fake_quantize(y, seen.output, bits)
            return y if linear.bias is None else y + linear.bias

        linear.__dict__["forward"] = forward
    try:
        yield
    finally:
        for _, linear in _linears(model):
            linear.__dict__.pop("forward", None)


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix, orthonormal, float64; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    normalized: torch.Tensor = matrix / size**0.5
    return normalized


def random_signs(count: int, seed: int) -> torch.Tensor:
    """Random signs, float64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def balance_rows(absmax_rows: Iterable[float]) -> torch.Tensor:
    """Powers of two that bring the loud rows of an up_proj down to the median row, [rows]."""
    loud = torch.tensor(list(absmax_rows), dtype=torch.float64)
    ratio = loud.median() / loud.clamp_min(1e-12)
    factors: torch.Tensor = torch.exp2(torch.round(torch.log2(ratio))).clamp(max=1.0)
    return factors
