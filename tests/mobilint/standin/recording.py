"""What every stand-in of Mobilint's compiler shares. No part of qbuild knows of it.

It accepts what the vendor documents and refuses everything else; its files have magics of their
own, which no reader of MBLT or MXQ takes for one, and hold what it was called with.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MBLT_MAGIC = b"STAND-IN, NOT AN MBLT\n"
MXQ_MAGIC = b"STAND-IN, NOT AN MXQ\n"


class Refused(TypeError):
    """Something that the vendor's documentation does not know."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


def need_type(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is int)
    need(fits, f"{name} is {value!r}, not {kind}")


def need_one_of(name: str, value: Any, *known: Any) -> None:
    need(any(value == each and type(value) is type(each) for each in known), f"{name}={value!r}")


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write(path: str | Path, magic: bytes, content: dict[str, Any]) -> None:
    Path(path).write_bytes(encoded(magic, content))


def encoded(magic: bytes, content: dict[str, Any]) -> bytes:
    return magic + json.dumps(content, indent=1, sort_keys=True).encode()


def read(path: str | Path, magic: bytes) -> dict[str, Any]:
    data = Path(path).read_bytes()
    need(data.startswith(magic), f"{path} is not of this stand-in")
    found: dict[str, Any] = json.loads(data[len(magic) :])
    return found


def save_rotation(path: Path, size: int, seed: str) -> None:
    """A random orthogonal float64 matrix as libtorch's torch::save(tensor) stores it: a
    TorchScript archive with one tensor "0"."""
    import torch

    generator = torch.Generator().manual_seed(int(seed[:12], 16))
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    module = torch.nn.Module()
    module.register_parameter("0", torch.nn.Parameter(torch.linalg.qr(noise)[0], False))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(module).save(str(path))


def compile_mxq(
    mblt: str, save_path: str, calib_data_path: str, spin_weight: str, call: dict[str, Any]
) -> None:
    """The common end of all mxq_compile: reads what is named, writes an output and, with
    SpinR1, the rotation where this version writes it."""
    need_type("the mblt", mblt, str)
    need_type("save_path", save_path, str)
    need_type("calib_data_path", calib_data_path, str)
    source = read(mblt, MBLT_MAGIC)
    files = Path(calib_data_path).read_text(encoding="utf-8").splitlines()
    need(bool(files) and all(Path(file).is_absolute() for file in files), "paths are absolute")
    transforms = call["transforms"]
    content = {
        "call": call,
        "mblt": source,
        "samples": [sample(file) for file in files],
        "rotation": None,
    }
    stem = Path(mblt).stem
    if transforms.get("SpinR1", {}).get("apply"):
        rotation = Path(spin_weight, "spinWeight", stem, "R1", "global_rotation.pth")
        save_rotation(rotation, int(source["hidden_size"]), sha256(mblt))
        content["rotation"] = sha256(rotation)
    head = transforms.get("HeadOutChRotation", {})
    if head.get("apply"):
        content["rotation"] = sha256(head["matrixPath"])
    need(Path(save_path).parent.is_dir(), "the folder of save_path must be there")
    write(save_path, MXQ_MAGIC, content)


def sample(file: str) -> dict[str, Any]:
    import numpy as np

    array = np.load(file, allow_pickle=False)
    need(array.dtype == np.float32, f"{file} is {array.dtype}")
    return {"shape": list(array.shape), "sha256": sha256(file)}
