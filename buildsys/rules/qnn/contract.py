"""io.json: what goes into the contexts and comes out, and the proof that the binaries have it.

The names, shapes and encodings of a binary's inputs and outputs are read back with libQnnSystem
and must be those that were planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from buildsys.models.graph.inputs import language_rope, vision_rope
from buildsys.models.graph.language import cache_names, past_names

if TYPE_CHECKING:
    from buildsys.formats.qnn_binary import QnnBinary, QnnTensor
    from buildsys.plan.graph import Json
    from buildsys.rules.qnn.pieces import Cut, Piece
    from buildsys.rules.qnn.targets import Target

FORMAT = 1
QNN_TYPES = {"uint16": "ufxp16", "uint8": "ufxp8"}
# QNN keeps scales as float32, as we do; a last digit may be lost on the way.
SCALE_TOLERANCE = 1e-6


def contract(cut: Cut, pieces: Sequence[Piece], target: Target) -> dict[str, Json]:
    """The content of io.json without what only the rule knows (digests, versions)."""
    config = cut.model.config
    rope = language_rope(config)
    content: dict[str, Json] = {
        "format": FORMAT,
        "target": {"soc": target.soc, "soc_model": target.model, "arch": target.arch},
        "language": {
            "chunk": cut.chunk,
            "past": cut.past,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "cache_layout": "[kv_heads, tokens, head_dim]; keys behind RoPE",
            "rope": asdict(rope),
            "graphs": [_entry(piece) for piece in pieces if piece.part == "language"],
        },
    }
    vision = [piece for piece in pieces if piece.part == "vision"]
    if vision and config.vision is not None:
        content["vision"] = {
            "patches": cut.patches,
            "merge_size": config.vision.spatial_merge_size,
            "patch_size": config.vision.patch_size,
            "temporal_patch_size": config.vision.temporal_patch_size,
            "rope": asdict(vision_rope(config)),
            "graphs": [_entry(piece) for piece in vision],
        }
    return content


def _entry(piece: Piece) -> dict[str, Json]:
    entry: dict[str, Json] = {
        "name": piece.name,
        "model": f"{piece.name}_ctx.onnx",
        "binary": f"{piece.name}_ctx_qnn.bin",
        "layers": list(piece.layers),
        "inputs": [_tensor(piece, name) for name in piece.graph.inputs],
        "outputs": [_tensor(piece, name) for name in piece.graph.outputs],
    }
    if piece.part == "language":
        entry["cache"] = [
            {"layer": layer, **_cache(layer, past_names(layer)[0] in piece.graph.inputs)}
            for layer in piece.layers
        ]
    return entry


def _cache(layer: int, with_past: bool) -> dict[str, str]:
    key, value = cache_names(layer)
    names = {"key": key, "value": value}
    if with_past:
        names["key_past"], names["value_past"] = past_names(layer)
    return names


def _tensor(piece: Piece, name: str) -> dict[str, Json]:
    encoding = piece.quantized.encodings[name]
    return {"name": name, "shape": list(piece.graph.shapes[name]), **asdict(encoding)}


def differences(piece: Piece, binary: QnnBinary, target: Target) -> Iterator[str]:
    """Where a binary is not what was planned: target, graphs, names, shapes, encodings."""
    if (binary.soc, binary.soc_model, binary.arch) != (target.soc, target.model, target.arch):
        yield (
            f"it is for {binary.soc} (number {binary.soc_model}, v{binary.arch}), not for "
            f"{target.soc} (number {target.model}, v{target.arch})"
        )
    if len(binary.graphs) != 1:
        yield f"it has {len(binary.graphs)} graphs, not one: a part was left to the CPU"
        return
    (graph,) = binary.graphs
    yield from _tensor_differences(piece, "input", piece.graph.inputs, graph.inputs)
    yield from _tensor_differences(piece, "output", piece.graph.outputs, graph.outputs)


def _tensor_differences(
    piece: Piece, what: str, planned: Sequence[str], found: Sequence[QnnTensor]
) -> Iterator[str]:
    there: Mapping[str, QnnTensor] = {tensor.name: tensor for tensor in found}
    if set(there) != set(planned):
        yield f"its {what}s are {', '.join(sorted(there))}, not {', '.join(sorted(planned))}"
        return
    for name in planned:
        encoding, tensor = piece.quantized.encodings[name], there[name]
        wanted = (QNN_TYPES[encoding.kind], piece.graph.shapes[name], encoding.zero_point)
        if (tensor.type, tensor.shape, tensor.zero_point) != wanted or not _near(
            tensor.scale, encoding.scale
        ):
            yield f"{what} {name} is {tensor}, planned was {wanted} with scale {encoding.scale}"


def _near(found: float | None, wanted: float) -> bool:
    return found is not None and abs(found - wanted) <= SCALE_TOLERANCE * wanted
