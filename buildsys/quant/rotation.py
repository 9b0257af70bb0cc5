"""Rotation of single tensors: norm fusion, R1, R2 and the ViT's, in float64.

Each function reads a tensor of any floating type, computes in float64 in chunks of about 2^18
numbers and rounds once to `out` (a new tensor of the weight's type by default; `out` may be the
weight itself, or a part of a file). Rows are independent in `fuse_norm` and `rotate_input`,
columns in `rotate_output` and `center_output`: a caller may pass any run of them alone.

`blocks` > 1 applies blockdiag(R, R, ...): per head (R2 with num_key_value_heads at v_proj's
output, num_attention_heads at o_proj's input), or the merger's four patches.
Source: QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al. 2024); mllm v1 tools/rotate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from buildsys.quant.errors import QuantError
from buildsys.quant.factored import ROWS_CHUNK, Rotation, spans


def fuse_norm(W: Tensor, gain: Tensor, *, blocks: int = 1, out: Tensor | None = None) -> Tensor:
    """W diag(gain): the norm's gain moved into the linear that reads it.

    W [out, in], gain [in / blocks]. The norm's weight is 1 afterwards.
    """
    source, target, out = _matrices(W, out)
    gain = _tiled(gain, blocks, source.shape[1], "norm weight")
    for first, count in spans(len(source), source.shape[1]):
        rows = slice(first, first + count)
        target[rows] = source[rows].to(torch.float64) * gain
    return out


def fuse_norm_bias(W: Tensor, norm_bias: Tensor, bias: Tensor | None, *, blocks: int = 1) -> Tensor:
    """bias + W norm_bias [out], float64: the norm's bias moved into the linear's.

    W [out, in] is the weight before `fuse_norm`; norm_bias [in / blocks]; no bias counts as 0.
    """
    source = W.reshape(len(W), -1)
    norm_bias = _tiled(norm_bias, blocks, source.shape[1], "norm bias")
    total = torch.zeros(len(source), dtype=torch.float64)
    for first, count in spans(len(source), source.shape[1]):
        rows = slice(first, first + count)
        total[rows] = source[rows].to(torch.float64) @ norm_bias
    return total if bias is None else total + bias.to(torch.float64)


def rotate_input(W: Tensor, R: Rotation, *, blocks: int = 1, out: Tensor | None = None) -> Tensor:
    """W R: a linear (or an embedding's rows) for inputs that were turned by R.

    W [out, blocks * n]. x W^T = (x R) (W R)^T.
    """
    source, target, out = _matrices(W, out)
    _check_width(source.shape[1], R, blocks, "in_features")
    for first, count in spans(len(source), source.shape[1], ROWS_CHUNK):
        rows = slice(first, first + count)
        vectors = source[rows].reshape(count * blocks, R.size)
        target[rows] = R.turn_rows(vectors).reshape(count, source.shape[1])
    return out


def rotate_output(W: Tensor, R: Rotation, *, blocks: int = 1, out: Tensor | None = None) -> Tensor:
    """R^T W: a linear whose outputs are turned by R. W [blocks * n, in], or a conv [.., in, ..]."""
    source, target, out = _matrices(W, out)
    _check_width(len(source), R, blocks, "out_features")
    for head in range(blocks):
        rows = slice(head * R.size, (head + 1) * R.size)
        for first, count in spans(source.shape[1], R.size):
            columns = slice(first, first + count)
            target[rows, columns] = R.turn(source[rows, columns].to(torch.float64).contiguous())
    return out


def rotate_bias(bias: Tensor, R: Rotation, *, blocks: int = 1) -> Tensor:
    """bias R [blocks * n], rounded once to the bias's type: belongs to `rotate_output`."""
    _check_width(len(bias), R, blocks, "the bias's length")
    return R.turn_rows(bias.reshape(blocks, R.size)).reshape(-1).to(bias.dtype)


def center_output(W: Tensor, *, out: Tensor | None = None) -> Tensor:
    """W minus the mean over its outputs, column by column: what it writes has mean 0.

    LayerNorm then equals RMSNorm. W [out, in], or a conv [out, ...].
    """
    source, target, out = _matrices(W, out)
    for first, count in spans(source.shape[1], len(source)):
        columns = slice(first, first + count)
        part = source[:, columns].to(torch.float64)
        target[:, columns] = part - part.mean(dim=0, keepdim=True)
    return out


def center_bias(bias: Tensor) -> Tensor:
    """bias minus its mean, rounded once to the bias's type: belongs to `center_output`."""
    wide = bias.to(torch.float64)
    return (wide - wide.mean()).to(bias.dtype)


def _matrices(W: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """W and out as [out, in] (a conv's kernel flattened), and out in its own shape."""
    if out is None:
        out = torch.empty(W.shape, dtype=W.dtype)
    elif out.shape != W.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the weight {tuple(W.shape)}")
    return W.reshape(len(W), -1), out.view(len(out), -1), out


def _tiled(vector: Tensor, blocks: int, width: int, what: str) -> Tensor:
    if len(vector) * blocks != width:
        raise QuantError(
            f"{what}: {blocks} x {len(vector)} values do not fit a linear with {width} inputs"
        )
    return vector.to(torch.float64).repeat(blocks)


def _check_width(width: int, R: Rotation, blocks: int, what: str) -> None:
    if width != R.size * blocks:
        raise QuantError(
            f"{what} is {width}, but the rotation turns {blocks} x {R.size}; "
            "is this rotation of another model?"
        )
