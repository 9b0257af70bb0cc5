"""One graph to one context binary, and a context's outputs: each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from buildsys.errors import StepError
from buildsys.rules.mobilint.running import run
from buildsys.rules.qnn.in_compiler import (
    compile_context,
    htp_session,
    onnx_writer,
    run_context,
)

if TYPE_CHECKING:
    from buildsys.models.graph.quantized import QuantizedGraph, ReadWeight
    from buildsys.rules.qnn.targets import Target
    from buildsys.rules.spec import StepContext

# What the programs import when they run: named here, so that its code counts too.
BESIDE_PROGRAMS = (htp_session, onnx_writer)


def compile_graph(
    step: StepContext, made: QuantizedGraph, read: ReadWeight, target: Target, work: Path
) -> tuple[Path, Path]:
    """NAME_ctx.onnx and the binary beside it, in `work`. Raises StepError with what the compiler
    said last."""
    name = made.graph.name
    _describe(made, work / f"{name}.json")
    np.savez(work / f"{name}.npz", **_weights(made, read))  # type: ignore[arg-type]  # numpy's stubs miss **arrays
    request = {"name": name, "options": target.provider_options()}
    (work / "compile.json").write_text(json.dumps(request), encoding="utf-8")
    run(step, [step.toolchain["python"], compile_context.__file__, "compile.json"], work)
    context = work / f"{name}_ctx.onnx"
    binary = work / f"{name}_ctx_qnn.bin"
    for file in (context, binary):
        if not file.is_file():
            raise StepError(f"{step.name}: the compiler ended well and wrote no {file.name}")
    for suffix in ("json", "npz", "onnx"):
        (work / f"{name}.{suffix}").unlink()
    return context, binary


def emulate(
    step: StepContext,
    made: QuantizedGraph,
    context: Path,
    target: Target,
    feeds: Sequence[Mapping[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """What the emulator makes of the feeds, dequantized. Runs beside the context."""
    work = context.parent
    arrays = {
        f"{index}/{name}": _whole(made.encodings[name].quantize(x), made.encodings[name].kind)
        for index, given in enumerate(feeds)
        for name, x in given.items()
    }
    np.savez(work / "feeds.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs miss **arrays
    request = {
        "model": context.name,
        "options": target.provider_options(),
        "feeds": "feeds.npz",
        "results": "results.npz",
        "runs": len(feeds),
    }
    (work / "run.json").write_text(json.dumps(request), encoding="utf-8")
    run(step, [step.toolchain["python"], run_context.__file__, "run.json"], work)
    with np.load(work / "results.npz") as results:
        found = [
            {
                name: made.encodings[name].dequantize(
                    torch.from_numpy(results[f"{index}/{name}"].astype(np.int64))
                )
                for name in made.graph.outputs
            }
            for index in range(len(feeds))
        ]
    for name in ("feeds.npz", "results.npz"):
        (work / name).unlink()
    return found


def _describe(made: QuantizedGraph, path: Path) -> None:
    graph = made.graph
    content = {
        "name": graph.name,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "nodes": [asdict(node) for node in graph.nodes],
        "shapes": dict(graph.shapes),
        "encodings": {name: asdict(encoding) for name, encoding in made.encodings.items()},
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def _weights(made: QuantizedGraph, read: ReadWeight) -> dict[str, np.ndarray]:
    """Whole numbers and scales of every linear; one scale for a tensor, or one per row."""
    arrays: dict[str, np.ndarray] = {}
    for node in made.graph.nodes:
        if node.op != "linear":
            continue
        weight = made.weight(node, read)
        each = {"weight": (weight.weight, weight.scales), "bias": (weight.bias, weight.bias_scales)}
        for key, (whole, scales) in each.items():
            if whole is not None and scales is not None:
                arrays[f"{node.output}.{key}"] = whole.numpy()
                scales = scales if made.per_channel else scales[0]
                arrays[f"{node.output}.{key}_scales"] = scales.contiguous().numpy()
    return arrays


def _whole(x: Tensor, kind: str) -> np.ndarray:
    return np.asarray(x.numpy().astype(kind))
