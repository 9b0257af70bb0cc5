"""Makes an mblt in the compiler's Python: by its ModelParser, or by mblt_compile (1.2 and later).

The request holds: model (a folder), part, inputs (a safetensors file: input_ids, pixel_values,
image_grid_thw), module, model_dict, wrapper, method ("parser" or "mblt_compile"), target_device,
device, blocks, save_path, and infer and comparison (paths, or null).
Source of the calls: the vendor's tutorial, compilation/vlm (mblt_compile_language.py,
mblt_compile_vision.py, utils.py), tags v0.11.0.1 to v1.1.2.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

QWEN2_VL = "parser.backend.fx_hf_extensions.transformers.models.qwen2vl"
# Dimensions that are as long as the prompt.
DYNAMIC = {"attention_mask": -1, "position_ids": -1, "inputs_embeds": 1, "cache_position": 0}


class Compiler:
    """The vendor's package under the names that this version has for its parts."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request

    def part(self, module: str) -> Any:
        """A module of model_dict."""
        return importlib.import_module(f"{self.request['model_dict']}.{module}")

    @property
    def qwen2_vl(self) -> Any:
        return self.part(QWEN2_VL)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    compiler = Compiler(request)
    model = load_model(compiler)
    inputs = load_inputs(request)
    prepare = language if request["part"] == "language" else vision
    target, feed, more = prepare(compiler, model, inputs)
    if request["method"] == "mblt_compile":
        importlib.import_module(request["module"]).mblt_compile(
            model=target,
            mblt_save_path=request["save_path"],
            target_device=request["target_device"],
            backend="torch",
            feed_dict=feed,
            **more,
        )
    else:
        parse(compiler, target, feed, more)


def load_model(compiler: Compiler) -> Any:
    """The model as the tutorial of that version loads it."""
    import transformers

    folder, device = compiler.request["model"], compiler.request["device"]
    if not compiler.request["wrapper"]:
        numbers = tuple(int(n) for n in transformers.__version__.split(".")[:2])
        kind = "dtype" if numbers >= (4, 56) else "torch_dtype"
        return loaded(transformers.Qwen2VLForConditionalGeneration, folder, **{kind: "auto"}).to(
            device
        )
    vendor = compiler.qwen2_vl
    model = loaded(vendor.Qwen2VLForConditionalGenerationWrapper, folder).to(device)
    model.projection = vendor.Projection(model.language_model, model.lm_head)
    inner = model.model
    inner.get_image_feature_class = vendor.Qwen2VLModel_get_image_feature(inner)
    inner.get_image_features = vendor.Qwen2VL_get_image_features.__get__(inner, type(inner))
    return model


def loaded(kind: Any, folder: str, **how: Any) -> Any:
    """The model, with every weight of the checkpoint. transformers 5 renames weights by the name
    of the class: to a subclass it gives random ones instead, and only prints a table."""
    import transformers

    model, told = kind.from_pretrained(folder, output_loading_info=True, **how)
    lost = sorted(set(told["missing_keys"]) - {"lm_head.weight"})
    if lost or told["mismatched_keys"]:
        sys.exit(
            f"transformers {transformers.__version__} did not load {len(lost)} weights into "
            f"{kind.__name__}, such as {(lost or told['mismatched_keys'])[0]}: the compiler's "
            "Python needs the version that the compiler was made for (4.57.1 for qbcompiler)"
        )
    return model


def load_inputs(request: dict[str, Any]) -> dict[str, Any]:
    """What `generate` takes: made by qbuild, so that no processor is needed here."""
    import torch
    import transformers
    from safetensors.torch import load_file

    inputs = {
        name: each.to(request["device"]) for name, each in load_file(request["inputs"]).items()
    }
    image_token = int(request["image_token"])
    if int(transformers.__version__.split(".")[0]) >= 5:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).to(torch.int32)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def first_call(compiler: Compiler, model: Any, module: Any, inputs: dict[str, Any]) -> Any:
    """What `module` is called with first when the model begins to answer."""
    tools = compiler.part("parser.backend.hf.util")
    container = tools.DefaultInputsCaptureContainer()
    with tools.InputCaptureCtxManager(module, 1, container):
        model.generate(**inputs, max_new_tokens=1)
    return container


def language(compiler: Compiler, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(module, feed, further arguments) of the language model."""
    import torch

    request = compiler.request
    backbone = getattr(model.model, "language_model", model.model)
    watched = model.projection if request["wrapper"] else backbone
    captured = dict(first_call(compiler, model, watched, inputs).captured_kwargs[-1])
    # transformers 5 leaves out a mask that masks nothing, and puts the positions in the text
    # before those of time, height and width.
    if not isinstance(captured["attention_mask"], torch.Tensor):
        captured["attention_mask"] = inputs["attention_mask"]
    captured["position_ids"] = captured["position_ids"][-3:]
    wrap = compiler.part("parser.backend.torch.util").wrap_tensor
    feed = {
        name: wrap(name, value) if isinstance(value, torch.Tensor) else value
        for name, value in captured.items()
    }
    for name, dimension in DYNAMIC.items():
        if name in feed:  # transformers 5 has no cache_position
            feed[name].src_shape[dimension].set_dynamic(True)
    wrapper = compiler.part("parser.backend.torch.object_wrapper")
    wrapper.set_attention_mask(feed["attention_mask"], "causal_mask")
    if request["method"] == "mblt_compile":
        feed["logits_to_keep"] = 1
    if request["wrapper"]:
        target = model.projection
        inner = target.language_model
        inner.rotary_emb = compiler.qwen2_vl.CachedQwen2VLTextRotaryEmbedding(inner.rotary_emb)
        meta = {"type": "list", "keys": [0]}
    else:
        target = compiler.qwen2_vl.LanguageModelForQwen2VL(model)
        inner = target.model
        meta = {"type": "dict", "keys": ["logits"]}
    if request["blocks"] is not None:
        inner.layers = inner.layers[: request["blocks"]]
    inner.rotary_emb.set_rope(captured["position_ids"])
    return target, feed, {"output_meta": meta}


def vision(compiler: Compiler, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(module, feed, further arguments) of the vision encoder."""
    visual = getattr(model, "visual", None)
    visual = model.model.visual if visual is None else visual
    container = first_call(compiler, model, visual, inputs)
    arguments, keywords = container.captured_args[0], container.captured_kwargs[0]
    pixel_values = arguments[0] if arguments else keywords["hidden_states"]
    grid = keywords["grid_thw"]
    images = compiler.qwen2_vl.repreprocess_pixel_values(pixel_values, grid[0])
    wrap = compiler.part("parser.backend.torch.util").wrap_tensor
    device = compiler.request["device"]
    target = compiler.qwen2_vl.VisionModelForQwen2VL(model)
    target.set_grid_thw(grid.to(device))
    target.to(device)
    return target, {"images": wrap("images", images.to(device))}, {}


def parse(compiler: Compiler, target: Any, feed: Any, more: dict[str, Any]) -> None:
    """By ModelParser, with the comparison against the original where it is asked for."""
    request = compiler.request
    parser = compiler.part("parser.parser").ModelParser(
        model=target,
        backend="torch",
        target_device=request["target_device"],
        yolo_decode_include=True,
    )
    parser.cfg.allocate_to_devices = True
    parser.cfg.split_supported_concat = True
    parser.parse(feed_dict=feed, save_subgraph_type=1, debug=False, **more)
    model_dict, weight_dict = parser.get_md_wd(body_only=False)
    if request["part"] == "vision":
        inputs_are_nhwc(compiler, model_dict)
    elif not request["wrapper"]:
        attention_is_dynamic(compiler, model_dict, int(request["layers"]))
    serialize(compiler, model_dict, weight_dict)
    if request["infer"] is not None:
        parser.run_inference_and_compare_output_value(
            device=request["device"],
            save_all_inference_outputs=True,
            inference_all_outputs_write_path=request["infer"],
            compare_result_output_path=request["comparison"],
            use_value_dict_data_for_next_input=False,
            quantizer_save=True,
        )


def inputs_are_nhwc(compiler: Compiler, model_dict: Any) -> None:
    common = compiler.part("common")
    for graph in model_dict.subgraphs:
        for op in graph.operators:
            if op.layertype == common.LayerType.InputConstant:
                graph.activations[op.options.outputs[0]].dataformat = common.DataFormat.NHWC


def attention_is_dynamic(compiler: Compiler, model_dict: Any, layers: int) -> None:
    """Marks the lengths of queries and keys in every attention; the parsers before 1.1 leave
    that to their caller. The last layer asks for one token: its query length stays fixed."""
    kinds = compiler.part("common").LayerType
    match = compiler.part("parser.transform_operator.util").check_sequential_pattern_strict_bwd
    masked = (kinds.MultiplyConstant, kinds.StatefulAttentionMaskWrapper, kinds.Softmax)
    last = f"fx_patched_fn0_{layers - 2}/slice/matmul/mul/softmax/matmul_0"
    for graph in model_dict.subgraphs:
        acts = graph.activations
        for op in graph.operators:
            if op.layertype != kinds.MatMul:
                continue
            softmax = acts[op.options.inputs[0]].producer_op
            if softmax is None or softmax.layertype != kinds.Softmax:
                continue
            chain = match(softmax, graph, *masked)
            chain = chain or match(softmax, graph, kinds.MultiplyConstant, kinds.Softmax)
            if chain is None:
                continue
            query = op.name != last
            scores = acts[chain[0].options.inputs[0]]
            q, k = (acts[each] for each in scores.producer_op.options.inputs[:2])
            mark(scores, {2: query, 3: True})
            mark(q, {2: query})
            mark(k, {3: True})
            for each in chain:
                mark(acts[each.options.outputs[0]], {2: query, 3: True})
            mark(acts[op.options.outputs[0]], {2: query})


def mark(activation: Any, dimensions: dict[int, bool]) -> None:
    shape = activation.get_act_src_shape()
    for dimension, dynamic in dimensions.items():
        shape[dimension].set_dynamic(dynamic)
    activation.shape = shape[1:]


def serialize(compiler: Compiler, model_dict: Any, weight_dict: Any) -> None:
    for graph in model_dict.subgraphs:
        graph.sort_operators()
    made = (
        compiler.part("serialize")
        .SerializeMeta()
        .serialize(model_dict, weight_dict, ignore_weight=False)
    )
    with Path(compiler.request["save_path"]).open("wb") as file:
        if isinstance(made, bytes):
            file.write(made)
        else:
            made.write(file)


if __name__ == "__main__":
    main()
