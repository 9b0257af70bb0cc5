"""python one_node.py CASE: a graph of one node on HTP; prints its SQNR in dB.

Runs in the compiler's Python. CASE: "matmul16" (two 16-bit activations), "matmul8" (the second
in int8), "w4_zero_point" and "w4_symmetric" (4-bit weights), "reciprocal" (an RMSNorm taken
apart, of small numbers), "rms_norm" (the same, whole). The reference is the same quantized
arithmetic in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "buildsys/rules/qnn/in_compiler"))
from htp_session import open_session

OPTIONS = {"htp_arch": "75", "soc_model": "57"}


class Case:
    """A graph under construction, with the values that its tensors have."""

    def __init__(self) -> None:
        self.nodes, self.constants, self.inputs, self.feeds = [], [], [], {}
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def encoding(self, name: str, scale: np.ndarray, zero: np.ndarray) -> list[str]:
        return [self.constant(f"{name}/s", scale), self.constant(f"{name}/z", zero)]

    def activation(self, name: str, x: np.ndarray, kind: str) -> tuple[str, np.ndarray]:
        """A graph input, dequantized, and its values."""
        limits = np.iinfo(kind)
        scale = np.float32(np.abs(x).max() / (limits.max // (1 if kind == "int8" else 2)))
        zero = 0 if kind == "int8" else limits.max // 2 + 1
        q = np.clip(np.round(x / scale) + zero, limits.min, limits.max).astype(kind)
        self.feeds[name] = q
        onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        self.inputs.append(helper.make_tensor_value_info(name, onnx_type, x.shape))
        ends = self.encoding(name, np.array(scale), np.array(zero, kind))
        self.nodes.append(helper.make_node("DequantizeLinear", [name, *ends], [f"{name}/f"]))
        return f"{name}/f", (q.astype(np.float64) - zero) * float(scale)

    def add(self, op: str, inputs: list[str], **attributes: object) -> str:
        output = f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def requantized(self, x: str, values: np.ndarray) -> str:
        """The tensor through a 16-bit quantizer of its own range."""
        ends = self.range_of(x, values)
        q = self.add("QuantizeLinear", [x, *ends])
        return self.add("DequantizeLinear", [q, *ends])

    def range_of(self, name: str, values: np.ndarray) -> list[str]:
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        scale = np.float32((high - low) / 65535)
        self.last = (scale, round(-low / float(scale)))
        return self.encoding(name, np.array(scale), np.array(self.last[1], np.uint16))

    def sqnr(self, output: str, expected: np.ndarray) -> float:
        """Compile, run, and compare."""
        ends = self.range_of(f"{output}/out", expected)
        self.nodes.append(helper.make_node("QuantizeLinear", [output, *ends], ["y"]))
        out = helper.make_tensor_value_info("y", TensorProto.UINT16, expected.shape)
        for node in self.nodes:
            node.name = node.output[0]
        graph = helper.make_graph(self.nodes, "case", self.inputs, [out], self.constants)
        opset = [helper.make_opsetid("", 23)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), "case.onnx")
        made = open_session("case.onnx", OPTIONS).run(None, self.feeds)[0]
        found = (made.astype(np.float64) - self.last[1]) * float(self.last[0])
        noise = np.square(found - expected).sum()
        return float(10 * np.log10(np.square(expected).sum() / noise))


def matmul(second: str) -> float:
    case = Case()
    a, x = case.activation("a", case.rng.standard_normal((2, 64, 64)), "uint16")
    b, y = case.activation("b", case.rng.standard_normal((2, 64, 48)), second)
    return case.sqnr(case.add("MatMul", [a, b]), x @ y)


def four_bits(symmetric: bool) -> float:
    """A linear of 256 x 256 in int4, with the zero point of its range or with none."""
    case = Case()
    a, x = case.activation("a", case.rng.standard_normal((64, 256)), "uint16")
    weight = case.rng.standard_normal((256, 256)) + 0.5
    low, high = weight.min(), weight.max()
    scale = np.float32(max(-low, high) / 7 if symmetric else (high - low) / 15)
    zero = 0 if symmetric else round(-8 - low / float(scale))
    q = np.clip(np.round(weight / scale) + zero, -8, 7).astype(int)
    case.constants += [
        helper.make_tensor("w", TensorProto.INT4, q.shape, q.ravel().tolist()),
        helper.make_tensor("w/z", TensorProto.INT4, (), [zero]),
    ]
    w = case.add("DequantizeLinear", ["w", case.constant("w/s", np.array(scale)), "w/z"])
    return case.sqnr(case.add("MatMul", [a, w]), x @ ((q - zero) * float(scale)))


def rms(decomposed: bool) -> float:
    """RMSNorm of rows that differ in size, as real ones do."""
    case = Case()
    sizes = 0.02 * np.exp(case.rng.standard_normal((64, 1)))
    a, x = case.activation("a", case.rng.standard_normal((64, 256)) * sizes, "uint16")
    squares = np.square(x).mean(-1, keepdims=True)
    expected = x / np.sqrt(squares + 1e-6)
    if not decomposed:
        one = case.constant("g", np.full(256, 255, np.uint8))
        ends = case.encoding("g", np.array(1 / 255, np.float32), np.array(0, np.uint8))
        gain = case.add("DequantizeLinear", [one, *ends])
        made = case.add("RMSNormalization", [a, gain], axis=-1, epsilon=1e-6)
        return case.sqnr(made, expected)
    square = case.requantized(case.add("Mul", [a, a]), np.square(x))
    axes = case.constant("axes", np.array([-1], np.int64))
    mean = case.requantized(case.add("ReduceMean", [square, axes], keepdims=1), squares)
    root = case.requantized(case.add("Sqrt", [mean]), np.sqrt(squares))
    inverse = case.requantized(case.add("Reciprocal", [root]), 1 / np.sqrt(squares))
    return case.sqnr(case.add("Mul", [a, inverse]), expected)


CASES = {
    "matmul16": lambda: matmul("uint16"),
    "matmul8": lambda: matmul("int8"),
    "w4_zero_point": lambda: four_bits(symmetric=False),
    "w4_symmetric": lambda: four_bits(symmetric=True),
    "reciprocal": lambda: rms(decomposed=True),
    "rms_norm": lambda: rms(decomposed=False),
}

if __name__ == "__main__":
    print(CASES[sys.argv[1]]())
