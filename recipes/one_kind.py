"""A copy of qwen2vl-tiny with one kind of its outliers only: `basis`, `gains` or `up-down`.

    python one_kind.py MODEL_FOLDER KIND OUT_FOLDER

The two other kinds are undone by exact changes in float64; the weights are written in float32.
For qwen2vl-remedies.yaml: what a remedy repairs shows best where nothing else is broken.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
StateDict = dict[str, torch.Tensor]


def norms_of(state: StateDict) -> dict[str, list[str]]:
    """Each norm of the decoder's layers, and the linears that read it."""
    return {
        name: [f"{name.rsplit('.', 2)[0]}.{reader}.weight" for reader in READERS[kind]]
        for name in state
        if (kind := name.split(".")[-2]) in READERS
    }


def set_gains(state: StateDict, gains: StateDict) -> None:
    """Give the norms other gains, and the linears behind them what makes up for it."""
    for norm, readers in norms_of(state).items():
        for reader in readers:
            state[reader] = state[reader] * (state[norm] / gains[norm])
        state[norm] = gains[norm]


def level_rows(state: StateDict) -> None:
    """Bring loud rows of up_proj down to the median row, by powers of two; norms folded."""
    for name in [name for name in state if name.endswith("up_proj.weight")]:
        loudness = state[name].square().mean(1).sqrt()
        factors = torch.exp2(torch.round(torch.log2(loudness.median() / loudness))).clamp(max=1)
        down = name.replace("up_proj", "down_proj")
        state[name] = state[name] * factors[:, None]
        state[down] = state[down] / factors


def spread_residual(state: StateDict) -> None:
    """Turn the residual stream by a Hadamard matrix, so that no channel is loud; norms folded."""
    hidden = len(state["model.norm.weight"])
    basis = torch.ones(1, 1, dtype=torch.float64)
    while len(basis) < hidden:
        basis = torch.kron(basis, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    signs = torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    basis = basis * signs.double()[:, None] / hidden**0.5
    readers = {reader for each in norms_of(state).values() for reader in each}
    writers = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "visual.merger.mlp.2.weight")
    for name, tensor in state.items():
        if name in readers or name in {"model.embed_tokens.weight", "visual.merger.mlp.2.bias"}:
            state[name] = tensor @ basis
        elif name.endswith(writers):
            state[name] = basis.T @ tensor


def keep_one_kind(state: StateDict, kind: str) -> StateDict:
    """Float32 weights with outliers of that kind only."""
    state = {name: tensor.double() for name, tensor in state.items()}
    gains = {norm: state[norm] for norm in norms_of(state)}
    set_gains(state, {norm: torch.ones_like(gain) for norm, gain in gains.items()})
    if kind != "up-down":
        level_rows(state)
    if kind != "basis":
        spread_residual(state)
    if kind == "gains":
        set_gains(state, gains)
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def main() -> None:
    """Write the folder: other weights, all else as it is."""
    model, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, out / file.name)
    state = keep_one_kind(load_file(model / "model.safetensors"), kind)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
