"""What fusion, centring, rotation and rescaling do to each tensor of a family.

The order is mllm's: fold the norm, centre, turn by the residual stream's matrix, turn by the
heads'; then the exact rescaling between pairs of linears. All products are float64; between the
steps values are rounded to `work` (float64: not at all; float32: as mllm's tools do).
Source: mllm v1 tools/rotate; QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.formats.tensors import TensorSource
from buildsys.models.family import Embedding, Family, Linear, Norm, Turn
from buildsys.models.rescaling import ROWS_DIVIDED
from buildsys.models.rotations import Rotations
from buildsys.quant import rotation as quant
from buildsys.quant.factored import Rotation
from buildsys.quant.rescale import divide_rows, multiply_columns


@dataclass(frozen=True)
class Transform:
    """How the tensors of `source` (classic names) change.

    fuse: norms are folded; fold_all: also those of a tower that is not turned. factors: linear ->
    its rescaling factors, as of `rescaling.factors_of_linears`.
    """

    family: Family
    source: TensorSource
    rotations: Rotations | None
    fuse: bool
    factors: Mapping[str, Tensor]
    work: torch.dtype
    fold_all: bool = False

    def folds(self, norm: Norm) -> bool:
        """Is this norm's gain (and bias) moved into the linears that read it?"""
        turned = self.rotations is None or self.rotations.turns(norm.tower)
        return self.fuse and norm.foldable and (self.fold_all or turned)

    def centres(self, linear: Linear) -> bool:
        """Is the mean of this linear's outputs taken away?"""
        return linear.centred and self.rotations is not None and self.rotations.turns(linear.tower)

    def changes_input(self, linear: Linear) -> bool:
        """Does a step mix or scale columns, so that whole rows are needed?"""
        folded = linear.norm is not None and self.folds(self.family.norms[linear.norm])
        return folded or self._find(linear.input_turn) is not None

    def changes_output(self, linear: Linear) -> bool:
        """Does a step mix rows, so that whole columns are needed?"""
        return self.centres(linear) or self._find(linear.output_turn) is not None

    def embedding(self, embedding: Embedding, rows: Tensor) -> Tensor:
        """Any run of rows of the embedding, turned."""
        R = self._find(embedding.turn)
        rows = rows.to(self.work)
        return rows if R is None else quant.rotate_input(rows, R)

    def input_side(self, linear: Linear, W: Tensor) -> Tensor:
        """Any run of rows [rows, in] of a weight, with the norm folded and the input turned."""
        W = W.to(self.work)
        if linear.norm is not None and self.folds(self.family.norms[linear.norm]):
            gain = self.source.read(f"{linear.norm}.weight")
            W = quant.fuse_norm(W, gain, blocks=linear.norm_repeats)
        R = self._find(linear.input_turn)
        if linear.input_turn is not None and R is not None:
            W = quant.rotate_input(W, R, blocks=linear.input_turn.blocks)
        return W

    def output_side(self, linear: Linear, W: Tensor) -> Tensor:
        """Any run of columns [out, columns] of a weight, centred and with the output turned."""
        W = W.to(self.work)
        if self.centres(linear):
            W = quant.center_output(W)
        R = self._find(linear.output_turn)
        if linear.output_turn is not None and R is not None:
            W = W.clone()
            part = _turned(linear.output_turn, R.size)
            W[part] = quant.rotate_output(W[part], R, blocks=linear.output_turn.blocks)
        return W

    def rescale(self, linear: Linear, W: Tensor, rows: slice, columns: slice) -> Tensor:
        """The part [rows, columns] of a weight, rescaled along the axis of its factors."""
        if linear.name not in self.factors:
            return W
        s = self.factors[linear.name]
        divided = linear.kind in ROWS_DIVIDED
        return divide_rows(W, s[rows]) if divided else multiply_columns(W, s[columns])

    def bias(self, linear: Linear) -> Tensor:
        """The bias [out], with the norm's bias folded, centred and turned."""
        b = self.source.read(linear.bias_name).to(self.work)
        if linear.norm is not None:
            norm = self.family.norms[linear.norm]
            if norm.bias and self.folds(norm):
                W, shift = (
                    self.source.read(linear.weight_name),
                    self.source.read(f"{norm.name}.bias"),
                )
                b = quant.fuse_norm_bias(W, shift, b, blocks=linear.norm_repeats).to(self.work)
        if self.centres(linear):
            b = quant.center_bias(b)
        R = self._find(linear.output_turn)
        if linear.output_turn is not None and R is not None:
            b = b.clone()
            part = _turned(linear.output_turn, R.size)
            b[part] = quant.rotate_bias(b[part], R, blocks=linear.output_turn.blocks)
        if linear.kind in ROWS_DIVIDED and linear.name in self.factors:
            b = divide_rows(b[:, None], self.factors[linear.name])[:, 0]
        return b

    def norm(self, norm: Norm, part: str) -> Tensor:
        """The norm's "weight" or "bias" [size]: 1 and 0 once it is folded."""
        if not self.folds(norm):
            return self.source.read(f"{norm.name}.{part}")
        return torch.full((norm.size,), 1.0 if part == "weight" else 0.0)

    def drops(self, norm: Norm) -> bool:
        """Has this LayerNorm become an RMSNorm, without a bias (mllm's construction)?"""
        by_mllm = self.rotations is not None and self.rotations.construction == "mllm"
        return by_mllm and norm.bias

    def _find(self, turn: Turn | None) -> Rotation | None:
        return None if self.rotations is None else self.rotations.find(turn)


def _turned(turn: Turn, size: int) -> slice:
    return slice(turn.start, turn.start + turn.blocks * size)
