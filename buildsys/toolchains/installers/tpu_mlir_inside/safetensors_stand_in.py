"""`safetensors.safe_open` for the converter: the original makes tensors of the real torch.

Installed as `safetensors`. Format: the length of a JSON header, the header, the payloads.
"""

from __future__ import annotations

import json
from typing import Any

import numpy
import torch

KINDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "boolean",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class safe_open:  # noqa: N801  # the original's name
    """A file whose tensors are read one by one."""

    def __init__(self, path: str, framework: str = "pt", device: str = "cpu") -> None:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(length))
        self._entries.pop("__metadata__", None)
        self._payloads = numpy.memmap(path, "u1", "r", offset=8 + length)

    def keys(self) -> list[str]:
        return list(self._entries)

    def get_tensor(self, name: str) -> Any:
        entry = self._entries[name]
        kind = getattr(torch, KINDS[entry["dtype"]])
        start, stop = entry["data_offsets"]
        payload = numpy.array(self._payloads[start:stop])  # a copy: the converter may write to it
        return torch.Tensor(payload.view(kind.stored).reshape(entry["shape"]), kind)
