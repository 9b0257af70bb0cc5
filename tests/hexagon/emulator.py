"""Kernels compiled for Hexagon and run under qemu, from arrays to arrays."""

from __future__ import annotations

import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from buildsys.quant.fixed_point import FixedScale
from buildsys.rules.hexagon_kernels import FLAGS, compiler_for
from buildsys.share import shared_folder
from buildsys.toolchains.finding import Found, find_toolchains
from tests.devices.packages import one_file

HERE = Path(__file__).parent
# bookworm's own qemu knows v65 and v66 only. This one knows v73; what is compiled for later
# Hexagons runs on it too, as long as it uses no instruction of theirs.
PACKAGE = "qemu-user/bookworm-backports"
KERNELS = ("quantize", "dequantize_add", "matmul", "silu_multiply", "rms_norm")


@cache
def emulator() -> Path:
    return one_file(PACKAGE, "usr/bin/qemu-hexagon")


@cache
def toolchain() -> Found:
    """The compiler that users get with the extra [hexagon]."""
    found = find_toolchains(["hexagon-llvm"], [shared_folder("toolchains")], {})
    return found.found["hexagon-llvm"]


def build_harness(arch: str, folder: Path) -> Path:
    """The program that runs kernels, with the kernels as the rule compiles them."""
    templates = Path(shared_folder("templates"))
    flags = [flag for flag in FLAGS if flag != "-fPIC"]
    sources = [str(HERE / "harness.c"), str(templates / "hexagon_kernels.c")]
    made = folder / f"harness-{arch}"
    argv = [*compiler_for(toolchain().fields, arch), *flags, "-static", "-s", "-I", str(templates)]
    subprocess.run([*argv, *sources, "-o", str(made)], check=True, timeout=120)
    return made


def run_kernel(
    harness: Path,
    kernel: str,
    arrays: list[np.ndarray[Any, Any]],
    *,
    shape: tuple[int, int],
    outputs: int = 0,
    x_zero_point: int = 0,
    scale: FixedScale = FixedScale(0, 0, 0),  # noqa: B008 (a named tuple: nobody changes it)
    epsilon: int = 0,
    skew: int = 0,
) -> bytes:
    """What the kernel wrote. Raises CalledProcessError with what it returned, if not 0."""
    words = [KERNELS.index(kernel), *shape, outputs, x_zero_point, *scale]
    header = struct.pack("<9iQi", *words, epsilon, skew).ljust(128, b"\0")
    body = b"".join(padded(each.tobytes()) for each in arrays)
    done = subprocess.run(
        [emulator(), "-cpu", "v73", harness],
        input=header + body,
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    return done.stdout


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 128)
