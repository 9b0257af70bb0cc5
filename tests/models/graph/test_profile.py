"""Ranges of the graphs' tensors: all of them, and beside figures that stay as they were."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from buildsys.models.graph.encodings import encodings_of
from buildsys.models.graph.evaluate import evaluate
from buildsys.models.graph.inputs import language_angles
from buildsys.models.graph.language import language_graph, layer_sizes
from buildsys.models.graph.profile import GraphProfile
from buildsys.models.graph.quantized import quantized_graph
from buildsys.models.graph.ranges import RangeObserver
from buildsys.models.graph.vision import vision_graph
from buildsys.models.graph.weights import LinearWeights
from buildsys.models.open import Model, open_model
from buildsys.models.profile_layers import profile_layers
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, make_rotations
from buildsys.models.samples import Length, Sample, TextSamples
from tests import tiny_models


class Pictures(TextSamples):
    """An image of 24 patches with text around its tokens."""

    def lengths(self) -> list[Length]:
        return [Length(sample.input_ids.shape[1], 24) for sample in self.windows]


def samples() -> list[TextSamples]:
    """One text and one image."""
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    ids = [5, *[tiny_models.IMAGE_TOKEN] * 6, 7, 8]
    picture = Sample(torch.tensor([ids]), pixels, torch.tensor([[1, 4, 6]]))
    return [
        Pictures((picture,)),
        TextSamples((Sample(torch.tensor([list(b"quick brown")])),)),
    ]


def profiled(model: Model, folder: Path, graphs: bool) -> tuple[Any, GraphProfile | None]:
    folder.mkdir(exist_ok=True)
    folded = rotated_tensors(model, None, fold_all=True)
    profile = GraphProfile(model, folded) if graphs else None
    found = profile_layers(model, rotated_tensors(model, None), samples(), folder, graphs=profile)
    return found, profile


def test_every_tensor_of_every_graph_has_a_range(qwen2vl_folder: Path, tmp_path: Path) -> None:
    model = open_model(qwen2vl_folder)
    _, profile = profiled(model, tmp_path / "states", graphs=True)
    assert profile is not None
    assert model.config.vision is not None
    names = frozenset(rotated_tensors(model, None, fold_all=True).names())
    graphs = (
        language_graph("l", layer_sizes(model.config), range(2), chunk=4, past=4, final=True),
        vision_graph(
            "v", model.config, names, patches=16, blocks=range(2), embed=True, merger=True
        ),
    )
    for graph in graphs:
        assert set(encodings_of(graph, profile.ranges, "uint16")) == set(graph.shapes)
    assert profile.ranges["lm_head"][0] < 0 < profile.ranges["lm_head"][1]


def test_ranges_are_those_of_the_module_and_cost_the_linears_nothing(
    qwen2vl_folder: Path, tmp_path: Path
) -> None:
    model = open_model(qwen2vl_folder)
    with_graphs, profile = profiled(model, tmp_path / "a", graphs=True)
    without, _ = profiled(model, tmp_path / "b", graphs=False)
    assert with_graphs == without
    assert profile is not None
    for name in ("model.layers.1.mlp.down_proj", "visual.merger.mlp.2", "lm_head"):
        low, high = profile.ranges[name]
        assert max(-low, high) == pytest.approx(without[name].output.ori, rel=0.2)
    # Exactly so where no bias is between the two, and the norm is not.
    o_proj = profile.ranges["model.layers.0.self_attn.o_proj"]
    seen = without["model.layers.0.self_attn.o_proj"].output.ori
    assert max(-o_proj[0], o_proj[1]) == pytest.approx(seen, rel=1e-4)


def test_any_token_may_come_so_embeddings_have_the_range_of_the_table(
    qwen2_folder: Path, tmp_path: Path
) -> None:
    model = open_model(qwen2_folder)
    tensors = rotated_tensors(model, None, fold_all=True)
    profile = GraphProfile(model, tensors)
    profile.see_embeddings()
    table = tensors.read("model.embed_tokens.weight")
    assert profile.ranges["model.embed_tokens"] == (float(table.min()), float(table.max()))


def test_one_massive_channel_is_spread_by_the_rotation(qwen2_folder: Path, tmp_path: Path) -> None:
    """A token with one residual channel 40,000 times as large as the others, as real models have:
    turned, the other tokens keep their bits."""
    folder = tmp_path / "massive"
    shutil.copytree(qwen2_folder, folder)
    weights = tiny_models.weights_of(folder)
    table = weights["model.embed_tokens.weight"]
    table[7, 3] = 40_000 * table.std()
    tiny_models.rewrite(folder, weights)
    model = open_model(folder)
    assert simulated_sqnr(model, "identity") < 20
    assert simulated_sqnr(model, "hadamard") > simulated_sqnr(model, "identity") + 8


def simulated_sqnr(model: Model, method: Literal["hadamard", "identity"]) -> float:
    """dB between the simulation and float, over all tokens but the massive first one."""
    made = make_rotations(
        model.family, method=method, seed=0, vision=False, construction="layernorm"
    )
    tensors = rotated_tensors(model, fit_rotations(made, model.family), fold_all=True)
    ids = torch.tensor([7, *b"the quick brown fox"])
    graph = language_graph(
        "g", layer_sizes(model.config), range(2), chunk=len(ids), past=0, final=True
    )
    cos, sin = language_angles(model.config, torch.arange(len(ids))[None])
    mask = torch.full((len(ids), len(ids)), -1e4).triu(1)
    hidden = tensors.read("model.embed_tokens.weight")[ids]
    feeds = {"model.embed_tokens": hidden, "cos": cos, "sin": sin, "mask": mask}
    observer, read = RangeObserver(), LinearWeights(tensors)
    exact = evaluate(graph, feeds, read, observer.of(graph))["model.norm"][1:]
    quantized = quantized_graph(graph, observer.seen, "uint16", per_channel=True)
    found = quantized.simulate(feeds, read)["model.norm"][1:]
    return -10 * math.log10(float((found - exact).square().sum() / exact.square().sum()))


def test_a_killed_run_goes_on_with_the_ranges_that_it_had(
    qwen2vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(qwen2vl_folder)
    _, whole = profiled(model, tmp_path / "whole", graphs=True)
    killed = tmp_path / "killed"

    def dies(self: GraphProfile) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GraphProfile, "see_embeddings", dies)
        with pytest.raises(KeyboardInterrupt):
            profiled(model, killed, graphs=True)
    assert "visual.blocks.1" in json.loads((killed / "progress.json").read_text())["finished"]
    _, resumed = profiled(model, killed, graphs=True)
    assert whole is not None
    assert resumed is not None
    assert resumed.ranges == whole.ranges
