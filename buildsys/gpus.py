"""The GPUs of this machine, without asking a library that knows them: a null build looks here."""

from __future__ import annotations

import os
import sys

from buildsys.identity import distribution_versions

# Builds of torch that have no CUDA in them; the plain wheel has.
WITHOUT_CUDA = ("+cpu", "+xpu", "+rocm")


def gpu_count() -> int:
    """NVIDIA devices that this machine has a node for."""
    try:
        with os.scandir("/dev") as nodes:
            names = [node.name for node in nodes]
    except OSError:
        return 0
    return sum(name.startswith("nvidia") and name[len("nvidia") :].isdigit() for name in names)


def torch_has_cuda() -> bool:
    """Would torch find a GPU here? By the device nodes and the name of torch's own build: a step
    that finds itself deceived fails, it does not go elsewhere."""
    if not gpu_count():
        return False
    version = distribution_versions(sys.path).get("torch", "+cpu")
    return not any(build in version for build in WITHOUT_CUDA)
