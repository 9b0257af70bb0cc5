"""The room of the mathematics stands alone and holds its temporaries small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import buildsys.quant

FILES = sorted(Path(buildsys.quant.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_else_of_qbuild_is_imported(file):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    assert not [name for name in imported if name.startswith("buildsys.") and ".quant" not in name]


MEASURE = """
import torch
from buildsys.quant import int8, random_rotation, rotation
torch.set_num_threads(1)
def peak():  # ru_maxrss begins at the parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
W = torch.ones(4096, 4096, dtype=torch.bfloat16)
R = random_rotation.make_rotation(4096)
out, levels = torch.zeros_like(W), torch.zeros(W.shape, dtype=torch.int8)
rotation.rotate_input(W[:256], R, out=out[:256])
before = peak()
rotation.fuse_norm(W, torch.ones(4096), out=out)
rotation.rotate_input(W, R, out=out)
rotation.rotate_output(W, R, out=out)
rotation.center_output(W, out=out)
int8.quantize_weight(W, out=levels)
print((peak() - before) / 1024)
"""


def test_temporaries_stay_within_64_mib():
    """On a weight of 16 M numbers, whose float64 copy alone would be 128 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 64
