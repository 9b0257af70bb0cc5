"""recipes/one_kind.py: copies of the shipped model with one kind of outliers, and its function."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from training.architecture import load_folder, new_model
from training.figures import Simulation, classic_config, rotate
from training.outliers import to_float64
from training.score import load_model, read_samples

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes" / "assets" / "qwen2vl-tiny"
MASSIVE = ROOT / "recipes" / "assets" / "qwen2vl-tiny-massive"


def loudest_channel(model: torch.nn.Module, sample: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Peak over rms of what layer 2's MLP reads before the gain, and of its hidden units."""
    layer = model.model.language_model.layers[2]  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    modules = (layer.post_attention_layernorm, layer.mlp.down_proj)  # type: ignore[union-attr]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore
        for module in modules
    ]
    with torch.inference_mode():
        model(**sample)
    for hook in hooks:
        hook.remove()
    residual, units = (x[0].square().mean(0).sqrt() for x in seen)
    return (
        float(residual.max() / residual.square().mean().sqrt()),
        float(units.max() / units.median()),
    )


@pytest.mark.parametrize("kind", ["basis", "gains", "up-down"])
def test_one_kind_is_left_and_the_function_kept(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    script = ROOT / "recipes" / "one_kind.py"
    subprocess.run([sys.executable, script, MODEL, kind, out], check=True)
    sample = next(read_samples(MODEL, ROOT / "recipes" / "assets" / "evaluation")).inputs
    shipped, model = load_model(MODEL), load_model(out)
    with torch.inference_mode():
        difference = (model(**sample).logits - shipped(**sample).logits).abs().max()
    assert difference < 1e-3  # of logits up to 20, in float32

    gain = load_folder(out)["model.layers.2.post_attention_layernorm.weight"]
    assert (gain.max() > 50) == (kind == "gains")
    residual, units = loudest_channel(model, sample)
    assert (residual > 5) == (kind == "basis")
    assert (units > loudest_channel(shipped, sample)[1] / 2) == (kind == "up-down")


def test_massive_constant_breaks_static_int8_and_rotation_repairs_it(tmp_path: Path) -> None:
    """Nothing else is uneven in this copy of the model."""
    out = tmp_path / "model"
    script = ROOT / "recipes" / "one_kind.py"
    subprocess.run([sys.executable, script, MASSIVE, "basis", out], check=True)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    model = new_model(classic_config(tokenizer, torch.bfloat16), seed=0)
    simulation = Simulation(tokenizer, model, pictures=16)
    state = to_float64(load_folder(out))
    plain = simulation.measure(state, "mllm-v1-vl")
    rotate(state)
    repaired = simulation.measure(state, "mllm-v1-vl")
    assert plain.exact_match < 0.8
    assert repaired.exact_match > 0.97
