"""A parser and the graph it makes: as much of model_dict as the vendor's tutorial touches."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from standin.qwen2vl import Projection, VisionModelForQwen2VL, WrappedLanguage
from standin.recording import MBLT_MAGIC, encoded, need, need_one_of, need_type
from standin.tensors import Dimension, WrappedTensor

LayerType = enum.Enum(
    "LayerType", "MatMul Softmax MultiplyConstant StatefulAttentionMaskWrapper InputConstant"
)
DataFormat = enum.Enum("DataFormat", "NCHW NHWC")


class Options:
    def __init__(self, inputs: list[int], outputs: list[int]) -> None:
        self.inputs, self.outputs = inputs, outputs


class Operator:
    def __init__(self, name: str, layertype: Any, inputs: list[int], output: int) -> None:
        self.name, self.layertype = name, layertype
        self.options = Options(inputs, [output])


class Activation:
    def __init__(self, sizes: list[int]) -> None:
        self._src_shape = [Dimension(size) for size in sizes]
        self.shape: list[Dimension] = self._src_shape[1:]
        self.producer_op: Any = None
        self.dataformat: Any = DataFormat.NCHW

    def get_act_src_shape(self) -> list[Dimension]:
        return self._src_shape


class Graph:
    """One subgraph: attention of each layer, or a lone input constant."""

    def __init__(self) -> None:
        self.activations: list[Activation] = []
        self.operators: list[Operator] = []
        self.sorted = False

    def activation(self, *sizes: int) -> int:
        self.activations.append(Activation(list(sizes)))
        return len(self.activations) - 1

    def operator(self, name: str, kind: Any, inputs: list[int], *sizes: int) -> int:
        output = self.activation(*sizes)
        made = Operator(name, kind, inputs, output)
        self.activations[output].producer_op = made
        self.operators.append(made)
        return output

    def sort_operators(self) -> None:
        self.sorted = True


def attention(graph: Graph, layer: int, masked: bool) -> None:
    """softmax(scale (Q K^T) [+ mask]) V under the names that the tutorial's parser gives."""
    # The vendor numbers the last of 28 layers 26.
    number = "" if layer == 0 else f"_{layer - 1}"
    prefix = f"fx_patched_fn0{number}/slice/matmul"
    q, k, v = (
        graph.activation(1, 2, 9, 8),
        graph.activation(1, 2, 8, 9),
        graph.activation(1, 2, 9, 8),
    )
    scores = graph.operator(prefix, LayerType.MatMul, [q, k], 1, 2, 9, 9)
    last = graph.operator(f"{prefix}/mul", LayerType.MultiplyConstant, [scores], 1, 2, 9, 9)
    if masked:
        kind = LayerType.StatefulAttentionMaskWrapper
        last = graph.operator(f"{prefix}/mask", kind, [last], 1, 2, 9, 9)
    softmax = graph.operator(f"{prefix}/mul/softmax", LayerType.Softmax, [last], 1, 2, 9, 9)
    graph.operator(f"{prefix}/mul/softmax/matmul_0", LayerType.MatMul, [softmax, v], 1, 2, 9, 8)


def check_sequential_pattern_strict_bwd(op: Operator, graph: Graph, *kinds: Any) -> Any:
    """The operators of `kinds` that end in `op`, each fed by the one before; else None."""
    need_type("the operator", op, Operator)
    need_type("the graph", graph, Graph)
    chain: list[Operator] = []
    for kind in reversed(kinds):
        if op is None or op.layertype is not kind:
            return None
        chain.insert(0, op)
        op = graph.activations[op.options.inputs[0]].producer_op
    return chain


class ModelDict:
    def __init__(self, graph: Graph) -> None:
        self.subgraphs = [graph]


class WeightDict(dict[str, Any]):
    pass


class ParserConfig:
    __slots__ = ("allocate_to_devices", "split_supported_concat")

    def __init__(self) -> None:
        self.allocate_to_devices = False
        self.split_supported_concat = False


class ModelParser:
    """targets: what this version calls devices."""

    targets: tuple[str, ...] = ("aries2",)

    def __init__(
        self, *, model: Any, backend: str, target_device: str, yolo_decode_include: bool
    ) -> None:
        need_type("model", model, (WrappedLanguage, Projection, VisionModelForQwen2VL))
        need_one_of("backend", backend, "torch")
        need_one_of("target_device", target_device, *self.targets)
        need_one_of("yolo_decode_include", yolo_decode_include, True)
        self.model, self.target_device = model, target_device
        self.cfg = ParserConfig()
        self._parsed: dict[str, Any] = {}
        self.model_dict = ModelDict(Graph())

    def parse(
        self,
        *,
        feed_dict: dict[str, Any],
        save_subgraph_type: int,
        debug: bool,
        output_meta: dict[str, Any] | None = None,
    ) -> None:
        need_one_of("save_subgraph_type", save_subgraph_type, 1)
        need_type("debug", debug, bool)
        need(self.cfg.allocate_to_devices is True, "cfg.allocate_to_devices")
        need(self.cfg.split_supported_concat is True, "cfg.split_supported_concat")
        self._parsed = describe(self.model, feed_dict, output_meta)
        self._parsed["target_device"] = self.target_device
        graph = self.model_dict.subgraphs[0]
        if isinstance(self.model, VisionModelForQwen2VL):
            graph.operator("constant", LayerType.InputConstant, [], 1, 6, 56, 56)
        else:
            layers = self._parsed["layers"]
            for layer in range(layers):
                attention(graph, layer, masked=layer % 2 == 0)

    def get_md_wd(self, *, body_only: bool) -> tuple[ModelDict, WeightDict]:
        need_one_of("body_only", body_only, False)
        return self.model_dict, WeightDict(self._parsed)

    def run_inference_and_compare_output_value(
        self,
        *,
        device: str,
        save_all_inference_outputs: bool,
        inference_all_outputs_write_path: str,
        compare_result_output_path: str,
        use_value_dict_data_for_next_input: bool,
        quantizer_save: bool,
    ) -> None:
        need_one_of("device", device, "cpu", "cuda")
        need_one_of("save_all_inference_outputs", save_all_inference_outputs, True)
        need_one_of("use_value_dict...", use_value_dict_data_for_next_input, False)
        need_one_of("quantizer_save", quantizer_save, True)
        Path(inference_all_outputs_write_path).write_bytes(b"STAND-IN VALUES\n")
        Path(compare_result_output_path).write_text('{"stand-in": true}\n', encoding="utf-8")


class ParserOf12(ModelParser):
    targets = ("aries-rb", "regulus-ra", "regulus-rb", "regulus-rb-usb")


def describe(model: Any, feed: dict[str, Any], meta: dict[str, Any] | None) -> dict[str, Any]:
    """What an mblt of this stand-in holds; refuses a feed that the tutorial would not give."""
    need_type("feed_dict", feed, dict)
    if isinstance(model, VisionModelForQwen2VL):
        need(set(feed) == {"images"} and meta is None, "the feed is the image alone")
        need(model.grid is not None, "set_grid_thw comes first")
        part = "vision"
    else:
        rotary = model.text.rotary_emb
        need(getattr(rotary, "positions", None) is not None, "set_rope comes first")
        expected = model.output_meta
        need(meta == expected, f"output_meta is {meta}, not {expected}")
        mask = feed["attention_mask"]
        need(mask.mask_kind == "causal_mask", "the attention mask is causal")
        part = "language"
    tensors = {name: each for name, each in feed.items() if isinstance(each, WrappedTensor)}
    need(all(not isinstance(each, torch.Tensor) for each in feed.values()), "tensors are wrapped")
    return {
        "part": part,
        "hidden_size": model.hidden_size,
        "layers": model.layer_count,
        "feed": {name: each.told() for name, each in sorted(tensors.items())},
        "logits_to_keep": feed.get("logits_to_keep"),
    }


class ChainedByteObj:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def write(self, file: BinaryIO) -> None:
        file.write(self._content)


class SerializeMeta:
    def serialize(
        self, model_dict: ModelDict, weight_dict: WeightDict, *, ignore_weight: bool
    ) -> bytes | ChainedByteObj:
        need_type("model_dict", model_dict, ModelDict)
        need_type("weight_dict", weight_dict, WeightDict)
        need_one_of("ignore_weight", ignore_weight, False)
        graph = model_dict.subgraphs[0]
        need(graph.sorted, "operators are sorted first")
        acts = graph.activations
        dynamic = {
            op.name: [d.dynamic for d in acts[op.options.outputs[0]].get_act_src_shape()]
            for op in graph.operators
        }
        formats = [acts[op.options.outputs[0]].dataformat.name for op in graph.operators]
        content = {**weight_dict, "dynamic": dynamic, "formats": formats}
        made = encoded(MBLT_MAGIC, content)
        return made if weight_dict["part"] == "vision" else ChainedByteObj(made)


def mblt_compile(
    *,
    model: Any,
    mblt_save_path: str,
    target_device: str,
    backend: str,
    feed_dict: dict[str, Any],
    output_meta: dict[str, Any] | None = None,
) -> None:
    need_one_of("backend", backend, "torch")
    need_one_of("target_device", target_device, *ParserOf12.targets)
    content = describe(model, feed_dict, output_meta)
    if content["part"] == "language":
        need_one_of("logits_to_keep", content["logits_to_keep"], 1)
    content["target_device"] = target_device
    Path(mblt_save_path).write_bytes(encoded(MBLT_MAGIC, content))
