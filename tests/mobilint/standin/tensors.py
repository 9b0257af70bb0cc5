"""Wrapped tensors and the capture of a module's inputs."""

from __future__ import annotations

from typing import Any

import torch
from standin.recording import need, need_one_of, need_type


class Dimension:
    def __init__(self, size: int) -> None:
        self.size, self.dynamic = size, False

    def set_dynamic(self, dynamic: bool) -> None:
        need_type("dynamic", dynamic, bool)
        self.dynamic = dynamic


class WrappedTensor:
    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.src_shape = [Dimension(size) for size in tensor.shape]
        self.mask_kind: str | None = None

    def told(self) -> dict[str, Any]:
        return {
            "shape": [dimension.size for dimension in self.src_shape],
            "dynamic": [dimension.dynamic for dimension in self.src_shape],
            "sum": float(self.tensor.double().sum()),
        }


def wrap_tensor(name: str, tensor: torch.Tensor) -> WrappedTensor:
    need_type("name", name, str)
    need_type(name, tensor, torch.Tensor)
    return WrappedTensor(name, tensor)


def set_attention_mask(tensor: WrappedTensor, kind: str) -> None:
    need_type("the mask", tensor, WrappedTensor)
    need_one_of("the kind of mask", kind, "causal_mask")
    tensor.mask_kind = kind


class DefaultInputsCaptureContainer:
    def __init__(self) -> None:
        self.captured_args: list[tuple[Any, ...]] = []
        self.captured_kwargs: list[dict[str, Any]] = []


class InputCaptureCtxManager:
    """Records what a module is called with, up to a number of calls."""

    def __init__(self, module: Any, limit: int, container: DefaultInputsCaptureContainer) -> None:
        need_type("module", module, torch.nn.Module)
        need_type("max_call_limit", limit, int)
        need_type("container", container, DefaultInputsCaptureContainer)
        self._module, self._limit, self._container = module, limit, container

    def __enter__(self) -> InputCaptureCtxManager:
        self._hook = self._module.register_forward_pre_hook(self._capture, with_kwargs=True)
        return self

    def _capture(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self._container.captured_args) < self._limit:
            self._container.captured_args.append(args)
            self._container.captured_kwargs.append(kwargs)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._hook.remove()
        need(kind is not None or bool(self._container.captured_args), "the module was never called")
