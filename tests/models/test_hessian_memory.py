"""GPTQ stays below its limit of memory, and goes on after a kill; the bytes are the same."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.models import rounded as module_under_test
from buildsys.models.errors import ModelError
from buildsys.models.hessian_memory import SOLVING, batches, check_limit, hessian_bytes, limit_of
from buildsys.models.layerwise import LayerwiseModel
from buildsys.models.open import Model, open_model
from buildsys.models.rotated import rotated_tensors
from buildsys.models.rounded import Rounded, rounded_layers
from tests.models.test_profile_layers import texts
from tests.models.test_rounded import peaks_of


def same(a: dict[str, Rounded], b: dict[str, Rounded]) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[name].weight.values, b[name].weight.values)
        and torch.equal(a[name].weight.scale, b[name].weight.scale)
        and torch.equal(a[name].bias, b[name].bias)
        for name in a
    )


class Runs:
    """GPTQ of one model under one set of ranges."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model = model
        self.ranges = peaks_of(model, texts(), folder / "profile")

    def layers(self, folder: Path, **more: Any) -> Any:
        folder.mkdir(exist_ok=True)
        return rounded_layers(
            self.model, rotated_tensors(self.model), [texts()], folder,
            ranges=self.ranges, target="mllm-v1-text", damping=0.01, **more,
        )  # fmt: skip


@pytest.fixture
def runs(qwen2_folder: Path, tmp_path: Path) -> Runs:
    return Runs(open_model(qwen2_folder), tmp_path)


def largest(model: Model) -> int:
    return max(linear.shape[1] for linear in model.family.linears.values() if linear.layer == 0)


def test_a_short_limit_takes_more_passes_and_gives_the_same_bytes(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(runs.layers(tmp_path / "whole"))
    held: list[int] = []
    hessians = module_under_test._hessians

    def watched(visit: Any, linears: Any) -> Any:
        found = hessians(visit, linears)
        held.append(hessian_bytes([each.H.shape[0] for each in found.values()]))
        return found

    monkeypatch.setattr(module_under_test, "_hessians", watched)
    limit = hessian_bytes([largest(runs.model)])
    parts = list(runs.layers(tmp_path / "parts", limit=limit))
    assert len(held) > len(whole)
    assert max(held) <= limit
    assert all(same(one, other) for one, other in zip(whole, parts, strict=True))


def test_linears_that_read_one_tensor_stay_together(runs: Runs) -> None:
    family = runs.model.family
    layer = [family.linears[name] for name in runs.ranges if family.linears[name].layer == 0]
    assert [len(part) for part in batches(family, layer, None)] == [7]
    one = hessian_bytes([largest(runs.model)])
    parts = batches(family, layer, one)
    assert [each for part in parts for each in part] == layer
    for part in parts:
        kinds = {linear.kind for linear in part}
        assert kinds >= {"q", "k", "v"} or not kinds & {"q", "k", "v"}


def test_a_limit_that_no_pass_can_hold_is_an_error_before_the_work(runs: Runs) -> None:
    family, n = runs.model.family, largest(runs.model)
    check_limit(family, runs.ranges, 24 * n * n)
    with pytest.raises(
        ModelError, match=rf"(?s)GPTQ needs 1 MiB for its {n} inputs.*Reserve 1 MiB"
    ):
        check_limit(family, runs.ranges, 24 * n * n - 1)
    check_limit(family, runs.ranges, limit_of(family, None))
    with pytest.raises(ModelError, match="and 0 MiB are left for it"):
        check_limit(family, runs.ranges, limit_of(family, 100 << 20))


SOLVE = """
import torch
from buildsys.quant.gptq import gptq_int8
torch.set_num_threads(1)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
def solve(n):
    H = torch.eye(n) + torch.ones(n, n)
    before = peak()
    gptq_int8(torch.ones(16, n), H, torch.tensor(0.1))
    return (peak() - before) / (n * n)
solve(256)
print(solve(2048))
"""


def test_to_solve_a_hessian_takes_no_more_than_is_reckoned() -> None:
    told = subprocess.run(
        [sys.executable, "-c", SOLVE], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert 8 < float(told) <= SOLVING


def test_a_killed_run_goes_on_behind_the_last_finished_layer(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(runs.layers(tmp_path / "whole"))
    # Killed while the second layer is under way: the samples went on through the first.
    list(islice(runs.layers(tmp_path / "killed"), 2))
    filled = []
    fill = LayerwiseModel.filled

    def counted(self: LayerwiseModel, stage: Any) -> Any:
        filled.append(stage.name)
        return fill(self, stage)

    monkeypatch.setattr(LayerwiseModel, "filled", counted)
    again = list(runs.layers(tmp_path / "killed"))
    assert filled == ["model.layers.1"]
    assert all(same(one, other) for one, other in zip(whole, again, strict=True))
