"""The graphs in float are transformers' model, whatever way they are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from buildsys.models.graph.evaluate import evaluate
from buildsys.models.graph.inputs import language_angles, vision_angles
from buildsys.models.graph.language import (
    COS,
    MASK,
    SIN,
    cache_names,
    language_graph,
    layer_sizes,
    past_names,
)
from buildsys.models.graph.vision import PIXELS, vision_graph
from buildsys.models.graph.weights import LinearWeights
from buildsys.models.open import Model, open_model
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, make_rotations
from buildsys.models.runtime import hidden_states, load_module, position_ids
from buildsys.models.samples import Sample
from tests import tiny_models

GRID = torch.tensor([[1, 4, 6]])
ROTATIONS = (None, "language", "layernorm", "mllm")


def picture() -> Sample:
    """An image of 24 patches with text around its tokens."""
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    image = [tiny_models.IMAGE_TOKEN] * 6
    ids = [1, tiny_models.FIRST_SPECIAL + 3, *image, tiny_models.FIRST_SPECIAL + 4, 7, 8, 9, 10]
    return Sample(torch.tensor([ids]), pixels, GRID)


def tensors_of(model: Model, construction: str | None) -> Any:
    """The model's tensors with folded norms, turned or not."""
    if construction is None:
        return rotated_tensors(model, None, fold_all=True)
    made = make_rotations(
        model.family,
        method="kronecker",
        seed=0,
        vision=construction != "language",
        construction="mllm" if construction == "mllm" else "layernorm",
    )
    return rotated_tensors(model, fit_rotations(made, model.family), fold_all=True)


def run_in_chunks(
    model: Model, weights: LinearWeights, hidden: Tensor, positions: Tensor, chunk: int, cut: int
) -> Tensor:
    """The hidden state behind the last norm, layer by layer in runs of `cut`, chunk by chunk."""
    cos, sin = language_angles(model.config, positions)
    count, layers = len(hidden), model.config.num_hidden_layers
    cache: dict[str, Tensor] = {}
    outputs = []
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        state, rows = hidden[part], len(hidden[part])
        mask = torch.full((rows, start + rows), -1e4).triu(1 + start)
        for first in range(0, layers, cut):
            run = range(first, min(first + cut, layers))
            graph = language_graph(
                "run", layer_sizes(model.config), run, chunk=rows, past=start,
                final=run[-1] == layers - 1,
            )  # fmt: skip
            feeds = {graph.inputs[0]: state, COS: cos[part], SIN: sin[part], MASK: mask}
            feeds |= {name: cache[name] for name in graph.inputs if name.endswith(".past")}
            made = evaluate(graph, feeds, weights)
            for layer in run:
                for mine, earlier in zip(cache_names(layer), past_names(layer), strict=True):
                    before = [cache[earlier]] if start else []
                    cache[earlier] = torch.cat([*before, made[mine]], 1)
            state = made[graph.outputs[-1]]
        outputs.append(state)
    return torch.cat(outputs)


@pytest.mark.parametrize(("chunk", "cut"), [(99, 2), (8, 1)])
def test_language_graphs_in_any_cut_are_the_model(qwen2_folder: Path, chunk: int, cut: int) -> None:
    model = open_model(qwen2_folder)
    tensors = tensors_of(model, "layernorm")
    sample = Sample(torch.tensor([list(b"the quick brown fox jumps")]))
    module = load_module(model, tensors)
    hidden = tensors.read("model.embed_tokens.weight")[sample.input_ids[0]]
    positions = position_ids(module, sample)
    found = run_in_chunks(model, LinearWeights(tensors), hidden, positions, chunk, cut)
    expected = hidden_states(module, sample)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("construction", ROTATIONS)
def test_an_image_goes_through_both_towers_as_in_the_model(
    qwen2vl_folder: Path, construction: str | None
) -> None:
    model = open_model(qwen2vl_folder)
    tensors, sample = tensors_of(model, construction), picture()
    weights = LinearWeights(tensors)
    tokens = run_vision(model, tensors, weights, sample, patches=24)
    hidden = tensors.read("model.embed_tokens.weight")[sample.input_ids[0]].clone()
    hidden[sample.input_ids[0] == tiny_models.IMAGE_TOKEN] = tokens
    # The reference is the model as it was, but for the rotation of its last hidden state.
    module = load_module(model, rotated_tensors(model, None))
    found = run_in_chunks(model, weights, hidden, position_ids(module, sample), 5, 2)
    logits = found @ tensors.read("lm_head.weight").T
    expected = module.lm_head(hidden_states(module, sample))  # type: ignore[operator]  # a Linear
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def run_vision(
    model: Model, tensors: Any, weights: LinearWeights, sample: Sample, patches: int
) -> Tensor:
    """The merged tokens of a sample's image, by a graph for so many patches."""
    assert sample.pixel_values is not None
    assert sample.image_grid_thw is not None
    assert model.config.vision is not None
    graph = vision_graph(
        "vision", model.config, frozenset(tensors.names()), patches=patches,
        blocks=range(model.config.vision.depth), embed=True, merger=True,
    )  # fmt: skip
    cos, sin, mask = vision_angles(model.config, sample.image_grid_thw, patches)
    count = len(sample.pixel_values)
    pixels = torch.zeros(patches, sample.pixel_values.shape[1])
    pixels[:count] = sample.pixel_values
    feeds = {PIXELS: pixels, COS: cos, SIN: sin, MASK: mask * -1e4}
    made = evaluate(graph, feeds, weights)[graph.outputs[0]]
    return made[: count // 4]


def test_padding_changes_no_image(qwen2vl_folder: Path) -> None:
    model = open_model(qwen2vl_folder)
    tensors, sample = tensors_of(model, "layernorm"), picture()
    weights = LinearWeights(tensors)
    exact = run_vision(model, tensors, weights, sample, patches=24)
    padded = run_vision(model, tensors, weights, sample, patches=64)
    torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-5)


def test_images_and_frames_do_not_see_each_other(qwen2vl_folder: Path) -> None:
    config = open_model(qwen2vl_folder).config
    _, _, mask = vision_angles(config, torch.tensor([[2, 2, 2], [1, 4, 2]]), 18)
    blocks = [4, 4, 8, 1, 1]  # two frames, an image, two rows of padding
    expected = ~torch.block_diag(*(torch.ones(n, n) for n in blocks)).bool()
    assert torch.equal(mask, expected)
