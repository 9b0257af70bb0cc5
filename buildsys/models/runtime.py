"""Runs a model: transformers' own module, filled from any source of tensors in classic names.

Traps of transformers 5 that are closed here: `forward` of Qwen2-VL needs mm_token_type_ids and
keeps `rope_deltas` between calls, so every call gets explicit position ids; rotary buffers do
not survive the meta device, so they are computed anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from buildsys.models.computing import HERE, Compute
from buildsys.models.errors import ModelError
from buildsys.models.freed_memory import give_back
from buildsys.models.key_layout import to_classic
from buildsys.models.open import Model

if TYPE_CHECKING:
    from buildsys.formats.tensors import TensorSource
    from buildsys.models.family import Family
    from buildsys.models.samples import Sample

# Behind a tensor of so many bytes the heap's free pages are given back: its temporaries in
# float64 were several times as large.
LARGE = 1 << 23


def load_module(
    model: Model, tensors: TensorSource | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """transformers' module for this model with the weights of `tensors`, in `dtype`, eval mode.

    tensors: classic names (default: the model's own; without a lm_head the embedding is tied).
    A LayerNorm whose bias is missing there becomes an RMSNorm (mllm's vision tower).
    Peak memory: the module plus one tensor. Raises ModelError for a missing tensor.
    """
    source = model.tensors if tensors is None else tensors
    module = skeleton(model, source)
    fill(module, "", source, model.family, Compute(dtype=dtype))
    return module


def skeleton(model: Model, source: TensorSource) -> nn.Module:
    """`load_module`'s module with its parameters on the meta device: `fill` gives them values."""
    module = _empty_module(model)
    _replace_layer_norms(module, set(source.names()))
    _restore_rotary_buffers(module)
    return module.eval()


def fill(
    part: nn.Module,
    name: str,
    source: TensorSource,
    family: Family,
    compute: Compute = HERE,
) -> None:
    """Give every parameter of `part` (whose classic name is `name`, "" for a whole module) its
    value. Peak memory: the part plus one tensor. Raises ModelError for a missing tensor."""
    present = set(source.names())
    for owner, attribute, full in _parameters(part, name):
        stored = stored_name(full, present, family)
        if stored not in present:
            raise ModelError("is missing", file=source.path, tensor=stored)
        # A copy: the source's tensor may lie over a mapped file that is released below.
        read = source.read(stored)
        weights = compute.there(read)
        if weights.data_ptr() == read.data_ptr():
            weights = weights.clone()
        setattr(owner, attribute, nn.Parameter(weights, requires_grad=False))
        source.release(stored)
        if weights.nbytes >= LARGE:
            give_back()


def empty(part: nn.Module) -> None:
    """Take the values away again: parameters go back to the meta device."""
    for owner, attribute, _ in _parameters(part, ""):
        there = torch.empty_like(getattr(owner, attribute), device="meta")
        setattr(owner, attribute, nn.Parameter(there, requires_grad=False))


def stored_name(name: str, present: Collection[str], family: Family) -> str:
    """The tensor that a parameter is read from: a head that is not stored is the embedding."""
    tied = name == family.head.weight_name and name not in present
    return family.embedding.weight_name if tied else name


def model_inputs(module: nn.Module, sample: Sample) -> dict[str, Tensor | bool]:
    """Keyword arguments of `module.forward` for one sample: batch 1, no cache, own positions.

    For multimodal modules position_ids [3, 1, n] follow the sample's real image grid.
    """
    inputs: dict[str, Tensor | bool] = {"input_ids": sample.input_ids, "use_cache": False}
    if sample.pixel_values is not None and sample.image_grid_thw is not None:
        inputs |= {"pixel_values": sample.pixel_values, "image_grid_thw": sample.image_grid_thw}
    inputs["position_ids"] = position_ids(module, sample)
    return inputs


def position_ids(module: nn.Module, sample: Sample) -> Tensor:
    """[1, n] for text models, [3, 1, n] (time, height, width) for Qwen2-VL."""
    count = sample.input_ids.shape[1]
    if not _is_multimodal(module):
        return torch.arange(count)[None]
    if sample.image_grid_thw is None:
        return torch.arange(count).expand(3, 1, count)
    backbone: Any = module.model
    kinds = (sample.input_ids == backbone.config.image_token_id).to(torch.int32)
    positions, _ = backbone.get_rope_index(
        sample.input_ids, mm_token_type_ids=kinds, image_grid_thw=sample.image_grid_thw
    )
    found: Tensor = positions
    return found


@torch.inference_mode()
def logits(module: nn.Module, sample: Sample) -> Tensor:
    """The logits [n, vocab] of one sample, in the module's dtype."""
    found: Tensor = module(**model_inputs(module, sample)).logits[0]
    return found


@torch.inference_mode()
def hidden_states(module: nn.Module, sample: Sample) -> Tensor:
    """The head's input [n, hidden] of one sample: the backbone alone is run."""
    backbone: Any = module.model
    found: Tensor = backbone(**model_inputs(module, sample)).last_hidden_state[0]
    return found


def _is_multimodal(module: nn.Module) -> bool:
    return hasattr(module.model, "visual")


def _empty_module(model: Model) -> nn.Module:
    """The module with its parameters on the meta device, and the head apart."""
    import transformers

    kinds = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (
            transformers.Qwen2_5_VLConfig,
            transformers.Qwen2_5_VLForConditionalGeneration,
        ),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    config_class, module_class = kinds[model.config.model_type]
    config = config_class.from_dict(dict(model.config.raw))
    config.tie_word_embeddings = False
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        module: nn.Module = module_class(config)
    return module


def _replace_layer_norms(module: nn.Module, present: set[str]) -> None:
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.LayerNorm) and f"{to_classic(name)}.bias" not in present:
            with torch.device("meta"):
                norm = nn.RMSNorm(child.normalized_shape, eps=child.eps)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, norm)


def _restore_rotary_buffers(module: nn.Module) -> None:
    """Their values are computed by the constructor, which ran on the meta device."""
    for name, child in list(module.named_modules()):
        if hasattr(child, "inv_freq"):
            parent, _, attribute = name.rpartition(".")
            rotary: Any = type(child)
            setattr(module.get_submodule(parent), attribute, rotary(child.config))


def _parameters(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, attribute, classic name) of every parameter of the module of that name."""
    for path, owner in list(module.named_modules()):
        for attribute, _ in list(owner.named_parameters(recurse=False)):
            yield owner, attribute, to_classic(".".join(filter(None, (name, path, attribute))))
