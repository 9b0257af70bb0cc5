"""Where the forward passes of a model run, and in which precision.

Weights and hidden states go to the device and into the precision by one function, `there`, and
come back as float32 by another, `back`; what is kept on disk, and every statistic, is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from buildsys.models.errors import ModelError

CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """A device, and the type of weights and hidden states on it."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def there(self, values: Tensor) -> Tensor:
        """The tensor on the device: numbers in the precision, indices and flags as they are."""
        dtype = self.dtype if values.dtype.is_floating_point else values.dtype
        return values.to(self.device, dtype)

    def buffers_there(self, module: nn.Module) -> None:
        """A module's own tables (of RoPE), on the device in the type that they have."""
        for child in module.modules():
            for name, values in list(child.named_buffers(recurse=False)):
                if not values.is_meta:
                    setattr(child, name, values.to(self.device))
            # Kept beside the buffer by transformers, and read where lengths grow.
            original: Any = getattr(child, "original_inv_freq", None)
            if isinstance(original, Tensor) and not original.is_meta:
                child.original_inv_freq = original.to(self.device)

    def name(self) -> str:
        """For metadata: the device, and which one it is where that decides sums."""
        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        return self.device.type


HERE = Compute()


def back(values: Tensor) -> Tensor:
    """The tensor as float32 on the CPU."""
    return values.to("cpu", torch.float32)


def open_compute(device: str, precision: str = "fp32") -> Compute:
    """The device of that name (cpu, cuda). ModelError where torch cannot use it: nothing here
    goes elsewhere on its own."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device cuda is asked for, and torch {torch.__version__} finds none here",
            remedy="Set device: cpu, or install a torch with CUDA and its driver.",
        )
    if device == "cuda":
        # An operation that would sum in an order of its own is an error: bytes are promised.
        torch.set_deterministic_debug_mode("error")
    if device not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is unknown", remedy="Use cpu or cuda.")
    return Compute(torch.device(device), PRECISIONS[precision])
