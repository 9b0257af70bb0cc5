"""The rotation of a model: makes the matrices that a family needs, and fits a file's to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch

from buildsys.formats.rotation_file import Rotation as RotationFile
from buildsys.formats.rotation_file import load_rotation
from buildsys.models.errors import ModelError
from buildsys.models.family import VISION_MATRICES, Family, Matrix, Tower, Turn
from buildsys.quant.factored import Rotation
from buildsys.quant.random_rotation import make_layernorm_rotation, make_rotation, method_of
from buildsys.quant.recover import recover

Method = Literal["auto", "hadamard", "kronecker", "identity"]
# "layernorm": LayerNorm survives it (R keeps the vector of ones). "mllm": mllm's own, any R,
# which turns the LayerNorms into RMSNorms.
Construction = Literal["layernorm", "mllm"]


@dataclass(frozen=True)
class Rotations:
    """A rotation file's matrices in factored form, of the sizes that a family needs.

    construction: how the vision tower was turned; None where it was not.
    of_qbuild: qbuild made the file. Others are mllm's, and are applied as mllm applies them.
    """

    factored: Mapping[Matrix, tuple[Rotation, ...]]
    construction: Construction | None
    of_qbuild: bool

    def find(self, turn: Turn | None) -> Rotation | None:
        """The matrix of a turn; None where there is no turn or the file has no such matrix."""
        if turn is None or turn.matrix not in self.factored:
            return None
        return self.factored[turn.matrix][turn.index]

    def turns(self, tower: Tower) -> bool:
        """Is this tower's residual stream turned?"""
        return tower == "language" or self.construction is not None


def make_rotations(
    family: Family, *, method: Method, seed: int, vision: bool, construction: Construction
) -> RotationFile:
    """Random rotations for every stream and head of a family, seeded one by one.

    Raises QuantError where `method` has no matrix of a size.
    """
    made: dict[Matrix, list[torch.Tensor]] = {"R_v": [], "R_vs_vit": []}
    methods: dict[str, str] = {}
    for matrix, (size, count) in family.matrices.items():
        if matrix in VISION_MATRICES and not vision:
            continue
        keeps_ones = matrix == "R_vit" and construction == "layernorm"
        methods[matrix] = method if method == "identity" else method_of(size, method)
        made[matrix] = [
            _make(size, method, seed, (matrix, index), keeps_ones) for index in range(count)
        ]
    turned = "R_vit" in made
    return RotationFile(
        R=made["R"][0],
        R_v=tuple(made["R_v"]),
        R_vit=made["R_vit"][0] if turned else None,
        R_vs_vit=tuple(made["R_vs_vit"]),
        metadata={
            "model_type": family.model_type,
            "seed": seed,
            "method": method,
            "methods": dict(methods),
            "vision": construction if turned else None,
        },
    )


def _make(
    size: int, method: Method, seed: int, stream: tuple[str, int], keeps_ones: bool
) -> torch.Tensor:
    if method == "identity":
        return torch.eye(size, dtype=torch.float64)
    if keeps_ones:
        return make_layernorm_rotation(size, seed=seed, stream=stream).dense()
    return make_rotation(size, method=method, seed=seed, stream=stream).dense()


def load_rotations(path: str | PathLike[str], family: Family) -> Rotations:
    """A rotation file of qbuild's, mllm's or Mobilint's, fitted to a family.

    Raises FormatError for a damaged file and ModelError, naming the matrix, for one of another
    model: wrong size or number.
    """
    return fit_rotations(load_rotation(path), family, path)


def fit_rotations(
    file: RotationFile, family: Family, path: str | PathLike[str] | None = None
) -> Rotations:
    """The file's matrices, factored and checked against the family. Raises ModelError."""
    given: dict[Matrix, tuple[torch.Tensor, ...]] = {"R": (file.R,), "R_v": file.R_v}
    if file.R_vit is not None:
        given.update({"R_vit": (file.R_vit,), "R_vs_vit": file.R_vs_vit})
    found: dict[Matrix, tuple[Rotation, ...]] = {}
    for matrix, stack in given.items():
        if stack:  # Mobilint's file has R alone
            _check_fit(matrix, stack, family, path)
            found[matrix] = tuple(recover(R, f"{matrix}[{i}]") for i, R in enumerate(stack))
    construction: Construction | None = None
    if "R_vit" in found:
        construction = "layernorm" if file.metadata.get("vision") == "layernorm" else "mllm"
    return Rotations(found, construction, bool(file.metadata))


def _check_fit(
    matrix: Matrix,
    stack: tuple[torch.Tensor, ...],
    family: Family,
    path: str | PathLike[str] | None,
) -> None:
    remedy = "The rotation was made for another model: make one for this model."
    if matrix not in family.matrices:
        message = f"acts on nothing in a {family.model_type}"
        raise ModelError(message, file=path, tensor=matrix, remedy=remedy)
    size, count = family.matrices[matrix]
    if len(stack) != count or len(stack[0]) != size:
        raise ModelError(
            f"{len(stack)} matrices of size {len(stack[0])}, the model needs {count} of {size}",
            file=path,
            tensor=matrix,
            remedy=remedy,
        )
