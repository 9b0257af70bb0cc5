"""Writes a quantized graph as ONNX: QuantizeLinear and DequantizeLinear around every node.

Runs in the compiler's Python, which has onnx and numpy and not qbuild. Inputs and outputs of the
graph are whole numbers, so nothing is left for the CPU. There is no Reciprocal (wrong on HTP), no
4-bit weight and no product of two 16-bit activations (made 8-bit in silence).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

OPSET, IR_VERSION = 23, 11  # RMSNormalization is of 23
ONNX_NAMES = {
    "rms_norm": "RMSNormalization",
    "layer_norm": "LayerNormalization",
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "matmul": "MatMul",
    "softmax": "Softmax",
    "sigmoid": "Sigmoid",
    "gelu": "Gelu",
    "transpose": "Transpose",
    "concat": "Concat",
    "reshape": "Reshape",
    "slice": "Slice",
    "linear": "Gemm",
}


class OnnxGraph:
    """Nodes and constants as they are added, from `graph.json` and the weights beside it.

    A tensor of the graph is whole numbers under its own name; every reader gets a
    DequantizeLinear of its own, as the execution provider's groups of nodes want it.
    """

    def __init__(self, described: dict[str, Any], weights: Any) -> None:
        self._graph = described
        self._weights = weights
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}

    def model(self) -> Any:
        """The ModelProto, checked."""
        import onnx
        from onnx import helper

        for node in self._graph["nodes"]:
            self._node(node)
        graph = helper.make_graph(
            self._nodes,
            self._graph["name"],
            [self._value(name) for name in self._graph["inputs"]],
            [self._value(name) for name in self._graph["outputs"]],
            list(self._constants.values()),
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="qbuild"
        )
        onnx.checker.check_model(model)
        return model

    def _node(self, node: dict[str, Any]) -> None:
        y, op = node["output"], node["op"]
        inputs = [self._read(name, y, at) for at, name in enumerate(node["inputs"])]
        if op == "convert":
            self._quantize(inputs[0], y)
            return
        more, attributes = self._arguments(node)
        self._add(ONNX_NAMES[op], [*inputs, *more], f"{y}/float", **attributes)
        self._quantize(f"{y}/float", y)

    def _arguments(self, node: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Further inputs of a node, and its attributes."""
        op, y, given = node["op"], node["output"], node["attributes"]
        if op == "linear":
            return self._linear(y), {"transB": 1}
        if op in ("rms_norm", "layer_norm"):
            return [self._ones(node)], {"axis": -1, "epsilon": given["epsilon"]}
        if op == "mul" and "value" in given:
            kind = self._graph["encodings"][y]["kind"]
            return [self._dequantized(y, [np.iinfo(kind).max], given["value"], kind)], {}
        if op == "reshape":
            return [self._constant(f"{y}/shape", np.array(self._graph["shapes"][y], np.int64))], {}
        if op == "slice":
            ends = {key: given[key] for key in ("start", "stop", "axis")}
            return [
                self._constant(f"{y}/{key}", np.array([value], np.int64))
                for key, value in ends.items()
            ], {}
        if op == "transpose":
            return [], {"perm": list(given["order"])}
        return [], {"axis": given["axis"]} if "axis" in given else {}

    def _ones(self, node: dict[str, Any]) -> str:
        """A norm's gain, which is folded: ones. 16-bit LayerNorm takes an 8-bit gain only."""
        y = node["output"]
        width = self._graph["shapes"][y][-1]
        return self._dequantized(y, [255] * width, 1.0, "uint8")

    def _dequantized(self, y: str, q: list[int], largest: float, kind: str) -> str:
        """A constant whose largest whole number stands for `largest`."""
        values = np.array(q, kind)
        scale = np.array(largest / np.iinfo(kind).max, np.float32)
        name = f"{y}/constant"
        names = [
            self._constant(name, values),
            self._constant(f"{name}/scale", scale),
            self._constant(f"{name}/zero", np.array(0, kind)),
        ]
        self._add("DequantizeLinear", names, f"{name}/float")
        return f"{name}/float"

    def _linear(self, y: str) -> list[str]:
        """Weight [out, in] in int8 and bias in int32, a scale for every row."""
        made = []
        for key, kind in (("weight", np.int8), ("bias", np.int32)):
            if f"{y}.{key}" not in self._weights:
                continue
            scales = self._weights[f"{y}.{key}_scales"]
            per_row = scales.ndim > 0
            zeros = np.zeros(scales.shape, kind)
            names = [
                self._constant(f"{y}/{key}", self._weights[f"{y}.{key}"]),
                self._constant(f"{y}/{key}/scale", scales),
                self._constant(f"{y}/{key}/zero", zeros),
            ]
            axis = {"axis": 0} if per_row else {}
            self._add("DequantizeLinear", names, f"{y}/{key}/float", **axis)
            made.append(f"{y}/{key}/float")
        return made

    def _read(self, name: str, reader: str, at: int) -> str:
        output = f"{name}/to/{reader}/{at}"
        self._add("DequantizeLinear", [name, *self._encoding(name)], output)
        return output

    def _quantize(self, x: str, name: str) -> None:
        self._add("QuantizeLinear", [x, *self._encoding(name)], name)

    def _encoding(self, name: str) -> list[str]:
        """Scale and zero point of a tensor, as constants."""
        encoding = self._graph["encodings"][name]
        kind = np.dtype(encoding["kind"])
        return [
            self._constant(f"{name}/scale", np.array(encoding["scale"], np.float32)),
            self._constant(f"{name}/zero", np.array(encoding["zero_point"], kind)),
        ]

    def _constant(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(values, name)
        return name

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node(op, inputs, [output], output, **attributes))

    def _value(self, name: str) -> Any:
        from onnx import helper

        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self._graph["encodings"][name]["kind"]))
        return helper.make_tensor_value_info(name, kind, self._graph["shapes"][name])


def write_onnx(graph: str, weights: str, target: str) -> None:
    """graph: JSON as `qbuild` writes it; weights: an .npz. Writes the ONNX file."""
    described = json.loads(Path(graph).read_text(encoding="utf-8"))
    with np.load(weights) as arrays:
        model = OnnxGraph(described, arrays).model()
    Path(target).write_bytes(model.SerializeToString(deterministic=True))
