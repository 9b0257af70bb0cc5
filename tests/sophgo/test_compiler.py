"""Real bmodels by the real compiler, run in its simulator."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from buildsys.formats.bmodel_file import read_bmodel
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TEXT = "The sky is blue because the air scatters the light of the sun. " * 4
RECIPE = """
qbuild: 1
name: small
sources:
  model: {model: ../model}
  text: {text: ../text.txt, samples: 1, tokens: 8}
artifacts:
  plain.bmodel:
    rule: bmodel
    inputs: {model: model}
    options: {seq_length: 32, quantize: bf16}
    outputs: {config: config/, info: info.json}
  wrong.bmodel:
    rule: bmodel
    inputs: {model: model}
    options: {seq_length: 32, quantize: bf16, num_device: 2}
  metrics.json:
    rule: bmodel-metrics
    inputs: {model: model, bmodels: [plain.bmodel], text: text}
    options: {prompt_tokens: 8, steps: 1}
gates: {metrics.json: {plain.bmodel prompt_error: 0.01, plain.bmodel token_mismatch: 0}}
"""
GPTQ_RECIPE = """
qbuild: 1
name: gptq
sources: {model: {model: ../quantized}}
artifacts:
  auto.bmodel:
    rule: bmodel
    inputs: {model: model}
    options: {seq_length: 32, quantize: auto, chip: cv186ah}
"""
MEASURED_RECIPE = """
qbuild: 1
name: measured
sources:
  model: {model: ../dequantized}
  text: {text: ../text.txt, samples: 1, tokens: 8}
  made: {file: ../made.bmodel}
artifacts:
  metrics.json:
    rule: bmodel-metrics
    inputs: {model: model, bmodels: [made], text: text}
    options: {prompt_tokens: 8, steps: 1}
"""


def qbuild(
    project: Path, environment: Mapping[str, str], *words: str, code: int = 0, cache: str = "cache"
) -> str:
    """What a qbuild prints that ends with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project,
        env=surroundings(project, environment, cache),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def surroundings(project: Path, environment: Mapping[str, str], cache: str) -> dict[str, str]:
    return {**os.environ, "QBUILD_CACHE": str(project / cache), "COLUMNS": "80", **environment}


def notes(build: Path, name: str) -> dict[str, Any]:
    """What the step of an artifact noted, by the last line of the journal about it."""
    for line in reversed((build / ".qbuild" / "journal").read_text().splitlines()):
        parts = line[line.index("{") :].split("\t")
        record = {key: value for part in parts for key, value in json.loads(part).items()}
        if record["kind"] == "done" and record["step"] == name:
            told: dict[str, Any] = record["notes"]
            return told
    raise AssertionError(f"{name} is not in the journal")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe, a text, and a random model of one layer as transformers 5 writes it."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    tiny_models.save_model(tiny_models.new_qwen2(**TINY).bfloat16(), tmp_path / "model")
    return tmp_path


def test_a_model_compiles_runs_as_float32_does_and_compiles_to_the_same_bytes_again(
    project: Path, compiler: dict[str, str], cache: Path
) -> None:
    qbuild(project, compiler, "build", "metrics.json")
    build = project / "build" / "small"
    figures = json.loads((build / "metrics.json").read_text())["variants"]["plain.bmodel"]
    assert figures["prompt_error"] < 0.002
    assert figures["decode_error"] < 0.002
    assert figures["token_mismatch"] == 0

    # qbuild's own reading of the bmodel, beside the vendor's tool.
    (package,) = (cache / "toolchains" / "tpu-mlir").glob("*/lib/*/site-packages/tpu_mlir")
    told = subprocess.run(
        [package / "bin" / "model_tool", "--info", build / "plain.bmodel"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    nets = read_bmodel(build / "plain.bmodel").nets
    assert [net.name for net in nets] == re.findall(r"^net \d+: \[(\w+)\]", told, re.MULTILINE)
    shown = [
        f"{t.name}, {list(t.shape)}, {t.dtype},"
        for net in nets
        for t in (*net.inputs, *net.outputs)
    ]
    lines = re.findall(r"^(?:in|out)put: (.*?) scale", told, re.MULTILINE)
    assert shown == lines
    info = json.loads((build / "info.json").read_text())
    assert [net["name"] for net in info["nets"]] == [net.name for net in nets]
    assert (build / "config" / "tokenizer.json").is_file()
    assert json.loads((build / "config" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    # In another store, where no net is kept, and in another folder.
    qbuild(project, compiler, "build", "plain.bmodel", "--build-dir", "second", cache="other")
    assert notes(project / "second", "plain.bmodel")["nets"]["kept"] == 0
    second = project / "second" / "plain.bmodel"
    assert (build / "plain.bmodel").read_bytes() == second.read_bytes()
    # A second time nothing runs.
    assert "up to date" in qbuild(project, compiler, "build", "plain.bmodel")


def test_a_net_that_fails_is_named_with_what_it_said(
    project: Path, compiler: dict[str, str]
) -> None:
    printed = qbuild(project, compiler, "build", "wrong.bmodel", code=1)
    message, _, _ = printed.partition("the end of its output")
    assert "could not compile the net" in message
    assert "qbuild log wrong.bmodel" in message
    assert "Traceback" not in message  # not of qbuild's own


def quantized(
    linear: torch.nn.Linear, group: int, method: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A linear as a GPTQ or AWQ checkpoint stores it with 4 bits, and the weights that this stands
    for. GPTQ packs along the rows and keeps zero points less one; AWQ packs along the columns, in
    an order of its own."""
    rows = linear.weight.detach().float().T  # [in, out], as both formats count
    grouped = rows.reshape(-1, group, rows.shape[1])
    low, high = grouped.amin(1), grouped.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(1, 15).to(torch.int64)
    levels = (grouped / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    restored = ((levels - zeros[:, None]) * scales.float()[:, None]).reshape(rows.shape)
    levels = levels.reshape(rows.shape).to(torch.int64)
    if method == "gptq":
        stored = {
            "qweight": packed(levels.reshape(-1, 8, levels.shape[1]).transpose(1, 2)),
            "qzeros": packed((zeros - 1).reshape(len(zeros), -1, 8)),
            "g_idx": torch.arange(len(rows), dtype=torch.int32) // group,
        }
    else:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        stored = {
            "qweight": packed(levels.reshape(len(rows), -1, 8)[..., order]),
            "qzeros": packed(zeros.reshape(len(zeros), -1, 8)[..., order]),
        }
    return {**stored, "scales": scales}, restored.T.contiguous()


def packed(fours: torch.Tensor) -> torch.Tensor:
    """int32 of eight 4-bit numbers each, along the last axis."""
    shifts = torch.arange(0, 32, 4)
    return (fours << shifts).sum(-1).to(torch.int32)


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_a_quantized_checkpoint_passes_through(
    method: str, project: Path, compiler: dict[str, str]
) -> None:
    """The bmodel computes what the checkpoint's dequantized weights compute."""
    torch.manual_seed(1)
    model: Any = tiny_models.new_qwen2(**TINY).half()
    stored: dict[str, torch.Tensor] = {}
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            parts, restored = quantized(linear, 64, method)
            stored |= {f"model.layers.{name}.{part}": each for part, each in parts.items()}
            linear.weight.data = restored.half()
    dequantized = tiny_models.save_model(model, project / "dequantized")
    folder = Path(shutil.copytree(dequantized, project / "quantized"))
    for name, tensor in tiny_models.weights_of(dequantized).items():
        if f"{name.removesuffix('.weight')}.qweight" not in stored:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": method, "bits": 4, "group_size": 64, "version": "gemm"}
    config["quantization_config"] = how
    (folder / "config.json").write_text(json.dumps(config))
    (project / "recipes" / "gptq.yaml").write_text(GPTQ_RECIPE)
    qbuild(project, compiler, "all", "recipes/gptq.yaml")
    build = project / "build" / "gptq"
    assert read_bmodel(build / "auto.bmodel").chip == "CV186X"
    shutil.copyfile(build / "auto.bmodel", project / "made.bmodel")
    (project / "recipes" / "measured.yaml").write_text(MEASURED_RECIPE)
    qbuild(project, compiler, "all", "recipes/measured.yaml")
    build = project / "build" / "measured"
    figures = json.loads((build / "metrics.json").read_text())["variants"]["made"]
    assert figures["prompt_error"] < 0.002


def test_killed_and_resumed_the_shipped_model_compiles_with_no_net_twice(
    tmp_path: Path, compiler: dict[str, str]
) -> None:
    """The Qwen2-VL of recipes/qwen2vl.yaml, text and vision; then with images of another size."""
    words = ["build", "recipes/qwen2vl.yaml", "sophgo/bm1684x.bmodel"]
    started = subprocess.Popen(
        [sys.executable, "-m", "buildsys", *words, "--log-format", "json"],
        cwd=tmp_path,
        env=surroundings(tmp_path, compiler, "cache"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert started.stdout is not None
    told = (json.loads(line) for line in started.stdout)
    assert any(each.get("unit") == "nets" and each["done"] >= 3 for each in told)
    started.kill()
    started.communicate()
    qbuild(tmp_path, compiler, *words)
    build = tmp_path / "build" / "qwen2vl"
    first = notes(build, "sophgo/bm1684x.bmodel")["nets"]
    assert first["kept"] >= 3
    config = json.loads((ROOT / "recipes/assets/qwen2vl-tiny/config.json").read_text())
    layers = config["num_hidden_layers"]
    count = 4 + 2 * layers
    assert first["kept"] + first["compiled"] == count
    made = read_bmodel(build / "sophgo" / "bm1684x.bmodel")
    assert {net.name for net in made.nets} >= {"vit", "embedding", "lm_head", f"block_{layers - 1}"}
    vit = next(net for net in made.nets if net.name == "vit")
    assert vit.inputs[0].shape == (144, 1176)

    other = ("-D", "side=112", "--build-dir", "other")
    qbuild(tmp_path, compiler, *words, *other)
    changed = notes(tmp_path / "other", "sophgo/bm1684x.bmodel")["nets"]
    assert changed == {"compiled": 1, "kept": count - 1}


def test_an_installed_toolchain_is_found_by_itself(cache: Path, tmp_path: Path) -> None:
    printed = qbuild(tmp_path, {"QBUILD_CACHE": str(cache)}, "toolchain", "show", "tpu-mlir")
    assert "tpu_mlir 1.30.2" in printed
