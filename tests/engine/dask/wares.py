"""A rule from a plugin, for a build and its workers: what it makes, says and waits for is told
by its options. `install` writes the distribution that names it."""

from __future__ import annotations

from pathlib import Path

MODULE = '''\
"""Reads its input, tells of its progress, waits for a file, and writes."""
import os
import time

from buildsys.rules.spec import InputSpec, Rule, StepContext

RULE = Rule(
    name="ware",
    doc="For tests.",
    inputs={"i": InputSpec("any", ("artifact", "file", "folder"), required=False, many=True)},
    options={name: {"type": "string", "default": ""} for name in ("text", "gate")},
    folder=True,
)


def make(step):
    print("begun", flush=True)
    step.progress(1, 3, "crates")
    deadline = time.monotonic() + 60
    while step.options["gate"] and not os.path.exists(step.options["gate"]):
        if time.monotonic() > deadline:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.02)
    parts = []
    for each in step.inputs.get("i", ()):
        path = each.path
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        parts += [p.read_text() for p in files]
    step.progress(3, 3, "crates")
    step.note("crates", 3)
    step.warn("fragile")
    step.out.mkdir()
    (step.out / "inner").mkdir()
    (step.out / "inner" / "text").write_text("".join(parts) + step.options["text"])
    (step.out / "run.sh").write_text("#!/bin/sh\\n")
    (step.out / "run.sh").chmod(0o755)
    print("MARK", flush=True)
'''


def install(folder: Path, mark: str = "done") -> str:
    """Make the distribution in a folder, which is returned for PYTHONPATH. mark: a word of the
    rule's code."""
    info = folder / "qbuild_wares-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qbuild-wares\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[qbuild.rules]\nware = qbuild_wares.ware\n")
    package = folder / "qbuild_wares"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ware.py").write_text(MODULE.replace("MARK", mark))
    return str(folder)
