"""Rotation matrices: mllm's `.bin` (read, written) and Mobilint's global_rotation.pth (read).

mllm: `torch.save` of a dict, "R" float64 [hidden, hidden] and "R_v" a list of one float64
[head_dim, head_dim] per layer; for VL also "R_vit" [embed, embed] and "R_vs_vit" a list of one
[vision head_dim, vision head_dim] per block (mllm v1, tools/rotate). qbuild adds a key "qbuild"
that tells how the matrices were made; mllm does not look at it.
Mobilint: a TorchScript archive with one float64 tensor "0", the rotation of the residual
stream that an mxq was compiled with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import TensorEntry
from buildsys.formats.torch_archive import TorchArchiveWriter, Tree
from buildsys.formats.torch_file import load_guarded
from buildsys.formats.torchscript_file import is_torchscript, read_torchscript

# mllm evaluates sqrt(n) in float32, which leaves its matrices 6e-8 off orthogonal.
ORTHOGONAL_WITHIN = 1e-6
REMEDY = "Give a rotation made by qbuild, by mllm's tools/rotate or by Mobilint's compiler."


@dataclass(frozen=True)
class Rotation:
    """The matrices of one rotation, float64 on the CPU, each orthogonal to 1e-6.

    `metadata` is what qbuild noted of their making: text, numbers and lists of them.
    """

    R: torch.Tensor
    R_v: tuple[torch.Tensor, ...] = ()
    R_vit: torch.Tensor | None = None
    R_vs_vit: tuple[torch.Tensor, ...] = ()
    metadata: Mapping[str, Tree] = field(default_factory=dict)
    format: Literal["mllm", "torchscript"] = "mllm"


def load_rotation(path: str | PathLike[str]) -> Rotation:
    """Read either kind of rotation file; `format` tells which it was.

    Raises FormatError, naming the matrix, where one is missing, not float64, not square, not
    orthogonal, or of another size than the others of its list.
    """
    file = Path(path)
    if is_torchscript(file):
        rotation = _from_torchscript(file)
    else:
        rotation = _from_dict(load_guarded(file), file)
    check_rotation(rotation, file)
    return rotation


def save_rotation(path: str | PathLike[str], rotation: Rotation) -> None:
    """Write mllm's kind of file, with the metadata under "qbuild"; equal content, equal bytes."""
    tree: dict[str, Tree] = {
        "R": _entry("R", rotation.R),
        "R_v": [_entry(f"R_v[{i}]", R) for i, R in enumerate(rotation.R_v)],
    }
    if rotation.R_vit is not None:
        tree["R_vit"] = _entry("R_vit", rotation.R_vit)
        tree["R_vs_vit"] = [_entry(f"R_vs_vit[{i}]", R) for i, R in enumerate(rotation.R_vs_vit)]
    if rotation.metadata:
        tree["qbuild"] = dict(rotation.metadata)
    with TorchArchiveWriter(path, tree) as writer:
        for name, matrix in matrices_of(rotation):
            writer.write(name, matrix)


def matrices_of(rotation: Rotation) -> list[tuple[str, torch.Tensor]]:
    """All matrices with the names that messages and files give them, in the order of the file."""
    named = [("R", rotation.R)]
    named += [(f"R_v[{i}]", R) for i, R in enumerate(rotation.R_v)]
    if rotation.R_vit is not None:
        named.append(("R_vit", rotation.R_vit))
        named += [(f"R_vs_vit[{i}]", R) for i, R in enumerate(rotation.R_vs_vit)]
    return named


def check_rotation(rotation: Rotation, file: str | PathLike[str] | None = None) -> None:
    """Raises FormatError, naming the matrix, for one that is no float64 orthogonal matrix."""
    for name, matrix in matrices_of(rotation):
        fault = _fault_of(matrix)
        if fault:
            raise FormatError(fault, file=file, tensor=name, remedy=REMEDY)
    for name, stack in (("R_v", rotation.R_v), ("R_vs_vit", rotation.R_vs_vit)):
        if len({tuple(matrix.shape) for matrix in stack}) > 1:
            raise FormatError("has matrices of different sizes", file=file, tensor=name)


def _fault_of(matrix: torch.Tensor) -> str | None:
    if matrix.dtype != torch.float64:
        return f"is {str(matrix.dtype).removeprefix('torch.')}, not float64"
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        return f"has shape {list(matrix.shape)}, which is not square"
    error = matrix @ matrix.T
    error.diagonal().sub_(1.0)
    worst = float(error.abs().max())
    # Not `worst > limit`: NaN must fail too.
    if not worst <= ORTHOGONAL_WITHIN:
        return f"is not orthogonal: R R^T differs from the identity by {worst:.3g}"
    return None


def _from_torchscript(file: Path) -> Rotation:
    tensors = read_torchscript(file)
    if list(tensors) != ["0"]:
        message = f"holds the tensors {list(tensors)}, not the one tensor '0'"
        raise FormatError(message, file=file, remedy=REMEDY)
    return Rotation(tensors["0"], format="torchscript")


def _from_dict(content: object, file: Path) -> Rotation:
    if not isinstance(content, dict):
        message = f"holds a {type(content).__name__}, not a dict of matrices"
        raise FormatError(message, file=file, remedy=REMEDY)
    if ("R_vit" in content) != ("R_vs_vit" in content):
        missing = "R_vs_vit" if "R_vit" in content else "R_vit"
        raise FormatError("is missing", file=file, field=missing, remedy=REMEDY)
    metadata = content.get("qbuild", {})
    return Rotation(
        R=_matrix(content.get("R"), "R", file),
        R_v=_matrices(content.get("R_v"), "R_v", file),
        R_vit=_matrix(content["R_vit"], "R_vit", file) if "R_vit" in content else None,
        R_vs_vit=_matrices(content.get("R_vs_vit", []), "R_vs_vit", file),
        metadata=metadata if isinstance(metadata, dict) else {},
    )


def _matrix(value: object, name: str, file: Path) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        fault = "is missing" if value is None else f"is a {type(value).__name__}, not a tensor"
        raise FormatError(fault, file=file, field=name, remedy=REMEDY)
    return value.detach()


def _matrices(value: object, name: str, file: Path) -> tuple[torch.Tensor, ...]:
    if not isinstance(value, Sequence):
        fault = "is missing" if value is None else f"is a {type(value).__name__}, not a list"
        raise FormatError(fault, file=file, field=name, remedy=REMEDY)
    return tuple(_matrix(matrix, f"{name}[{i}]", file) for i, matrix in enumerate(value))


def _entry(name: str, matrix: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, matrix.dtype, tuple(matrix.shape))
