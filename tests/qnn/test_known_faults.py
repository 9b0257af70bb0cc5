"""What this compiler gets wrong without a word, and that our graphs have none of it.

When one of the first tests fails, a new onnxruntime-qnn has mended something: the way around it
may go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buildsys.models.graph.encodings import encodings_of
from buildsys.models.graph.language import language_graph, layer_sizes
from buildsys.models.graph.quantized import quantized_graph
from buildsys.models.open import open_model
from buildsys.rules.qnn.in_compiler.onnx_writer import ONNX_NAMES

PROGRAM = str(Path(__file__).with_name("one_node.py"))


def sqnr(in_compiler: Callable[..., Any], case: str) -> float:
    done = in_compiler(PROGRAM, case)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize(
    ("wrong", "at_most", "right", "at_least"),
    [
        # The second operand becomes uint8.
        ("matmul16", 45.0, "matmul8", 80.0),
        # Results of Reciprocal end at a size, whatever the quantizer behind it.
        ("reciprocal", 10.0, "rms_norm", 60.0),
        # The zero point of a 4-bit weight is not taken off.
        ("w4_zero_point", 25.0, "w4_symmetric", 55.0),
    ],
)
def test_the_fault_is_there_and_the_way_around_it_is_right(
    in_compiler: Callable[..., Any], wrong: str, at_most: float, right: str, at_least: float
) -> None:
    assert sqnr(in_compiler, wrong) < at_most
    assert sqnr(in_compiler, right) > at_least


def test_our_graphs_have_no_reciprocal_no_zero_point_and_no_16_bit_second_operand(
    qwen2_folder: Path,
) -> None:
    assert not {"Reciprocal", "Div", "Sqrt"} & set(ONNX_NAMES.values())
    sizes = layer_sizes(open_model(qwen2_folder).config)
    graph = language_graph("g", sizes, range(2), chunk=4, past=4, final=True)
    ranges = dict.fromkeys(graph.ranges.values(), (-1.0, 1.0))
    assert encodings_of(graph, ranges, "uint16").keys() == graph.shapes.keys()
    made = quantized_graph(graph, ranges, "uint16", per_channel=True)
    for node in made.graph.nodes:
        if node.op == "matmul":
            encoding = made.encodings[node.inputs[1]]
            assert (encoding.kind, encoding.zero_point) == ("int8", 0)
