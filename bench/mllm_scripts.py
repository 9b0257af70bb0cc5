"""The work of mllm's scripts, restated from their documentation: whole model, dense products.

None of it is mllm's code. Each stage is what one script does, in a process of its own: load the
whole model in float32 with transformers, turn it by dense matrices in float64, and then

    profile    hooks on every linear keep what it reads and writes of all samples in memory;
               the maximum and the order statistic at 0.999 n of everything at once
    export     int8 weights by one scale each, and the ranges, as int8.pth
    rotated    the turned model in float32, as rotated.pth
    convert    a .pth as an .mllm of version 1, read whole
    quantize   the float .mllm by ggml's own C, a tensor at a time
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ggml_peer
import numpy as np
import torch
from torch import Tensor

MAGIC, F32, Q4_0, Q8_0, Q4_K, I8, I32 = 20012, 0, 2, 8, 12, 16, 18
CODES = {torch.float32: F32, torch.int8: I8, torch.int32: I32, torch.bool: I8}
FUSED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def load(model: Path, work: Path) -> Any:
    """The turned model: norms folded, then dense products in float64."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    turn(module, torch.load(work / "rotation.bin", weights_only=True))
    return module


@torch.no_grad()
def turn(module: Any, matrices: dict[str, Any]) -> None:
    R = matrices["R"].double()
    body = module.model
    fold(body.norm, [module.lm_head])
    for weight in (body.embed_tokens.weight, module.lm_head.weight):
        weight.copy_(weight.double() @ R)
    for layer, R_v in zip(body.layers, matrices["R_v"], strict=True):
        for norm, names in FUSED.items():
            linears = [layer.get_submodule(name) for name in names]
            fold(getattr(layer, norm), linears)
            for linear in linears:
                linear.weight.copy_(linear.weight.double() @ R)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(R.T @ linear.weight.double())
        turn_values(layer.self_attn, R_v.double())


def turn_values(attention: Any, R_v: Tensor) -> None:
    """v's output and o's input, head by head, by one block-diagonal matrix each."""
    v, o = attention.v_proj, attention.o_proj
    by_v = torch.kron(torch.eye(v.weight.shape[0] // len(R_v)).double(), R_v)
    by_o = torch.kron(torch.eye(o.weight.shape[1] // len(R_v)).double(), R_v)
    v.weight.copy_(by_v.T @ v.weight.double())
    o.weight.copy_(o.weight.double() @ by_o)
    if v.bias is not None:
        v.bias.copy_(v.bias.double() @ by_v)


def fold(norm: Any, linears: list[Any]) -> None:
    for linear in linears:
        linear.weight.copy_(linear.weight.double() * norm.weight.double())
    norm.weight.fill_(1.0)


@torch.no_grad()
def profile(model: Path, work: Path) -> None:
    module = load(model, work)
    kept: dict[str, tuple[list[Any], list[Any]]] = {}

    def hook(name: str) -> Any:
        def see(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output = output if linear.bias is None else output - linear.bias
            both = kept.setdefault(name, ([], []))
            both[0].append(inputs[0].numpy().copy())
            both[1].append(output.numpy().copy())

        return see

    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear):
            child.register_forward_hook(hook(name))
    for window in np.load(work / "windows.npy"):
        module(torch.from_numpy(window)[None], use_cache=False)
    found = {name: [statistics(side) for side in both] for name, both in kept.items()}
    (work / "distribution.json").write_text(json.dumps(found), encoding="utf-8")


def statistics(parts: list[Any]) -> list[float]:
    values = np.concatenate([part.reshape(-1) for part in parts])
    at = [int(len(values) * 1) - 1, int(len(values) * 0.999) - 1]
    ordered = np.partition(values, at)
    return [*(float(ordered[i]) for i in at), float(np.mean(values)), float(np.std(values))]


def export(model: Path, work: Path) -> None:
    found = json.loads((work / "distribution.json").read_text(encoding="utf-8"))
    made: dict[str, Tensor] = {}
    for name, tensor in load(model, work).state_dict().items():
        linear = name.removesuffix(".weight")
        if linear in found and "lm_head" not in name:
            scale = tensor.abs().max().clamp(min=1e-5) / 127
            made[name] = torch.round(tensor / scale).to(torch.int8).T
            made[f"{name}.scale"] = scale
        else:
            made[name] = tensor
    for linear, (before, behind) in found.items():
        made[f"{linear}.input_scale"] = torch.tensor(before[0])
        made[f"{linear}.output_scale"] = torch.tensor(behind[0])
        made |= {f"{linear}.clip_{side}": torch.tensor(True) for side in ("input", "output")}
    torch.save(made, work / "theirs.int8.pth")


def rotated(model: Path, work: Path) -> None:
    torch.save(load(model, work).state_dict(), work / "theirs.rotated.pth")


def convert(source: Path, target: Path) -> None:
    tensors = torch.load(source, weights_only=True)
    payloads = (
        (name, CODES[t.dtype], t.contiguous().numpy().tobytes()) for name, t in tensors.items()
    )
    write(target, list(payloads))


def write(target: Path, payloads: list[tuple[str, int, bytes]]) -> None:
    """A .mllm of version 1."""
    index = sum(24 + len(name) for name, _, _ in payloads)
    at = 12 + index
    with target.open("wb") as stream:
        stream.write(struct.pack("<iQ", MAGIC, index))
        for name, code, payload in payloads:
            head = struct.pack("<i", len(name)) + name.encode()
            stream.write(head + struct.pack("<QQi", len(payload), at, code))
            at += len(payload)
        for _, _, payload in payloads:
            stream.write(payload)


def quantize(source: Path, target: Path) -> None:
    """Types as mllm's quantizer gives them, and qbuild's fallback where rows do not divide."""
    found = ggml_peer.find_ggml()
    if found is None:
        raise SystemExit(ggml_peer.REMEDY)
    codes = {"Q4_0": Q4_0, "Q8_0": Q8_0, "Q4_K": Q4_K}
    shapes = json.loads((source.parent / "shapes.json").read_text(encoding="utf-8"))
    content = np.memmap(source, np.uint8, "r")
    payloads = []
    for name, start, size in entries(content):
        values = content[start : start + size].view(np.float32)
        if "norm" in name or "bias" in name:
            payloads.append((name, F32, values.tobytes()))
            continue
        rows = values.reshape(shapes[name])
        kind = "Q4_0" if "embed_tokens" in name else "Q8_0" if rows.shape[1] % 256 else "Q4_K"
        payloads.append((name, codes[kind], found[1](np.array(rows), kind).tobytes()))
    write(target, payloads)


def entries(content: Any) -> Any:
    """(name, offset, bytes) of every tensor of a .mllm of version 1."""
    (index,) = struct.unpack("<Q", content[4:12].tobytes())
    at = 12
    while at < 12 + index:
        (length,) = struct.unpack("<i", content[at : at + 4].tobytes())
        name = content[at + 4 : at + 4 + length].tobytes().decode()
        size, start, _ = struct.unpack(
            "<QQi", content[at + 4 + length : at + 24 + length].tobytes()
        )
        yield name, start, size
        at += 24 + length


def run(stage: str, model: Path, work: Path) -> None:
    """One stage, in this process."""
    torch.set_num_threads(1)
    pth, mllm = work / "theirs.int8.pth", work / "theirs.f32.mllm"
    if stage in ("profile", "export", "rotated"):
        {"profile": profile, "export": export, "rotated": rotated}[stage](model, work)
    elif stage == "convert int8":
        convert(pth, work / "theirs.int8.mllm")
    elif stage == "convert float":
        convert(work / "theirs.rotated.pth", mllm)
    else:
        quantize(mllm, work / "theirs.q4k.mllm")
