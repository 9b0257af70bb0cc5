"""Runs a program in the compiler's Python and watches what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.spec import StepContext

# How much of what the compiler said goes into the message; the log has it all.
LAST_LINES = 8


def run_program(step: StepContext, program: str, request: Mapping[str, Json], work: Path) -> None:
    """Run a file of `in_compiler` with a request, in the folder `work`. Raises StepError."""
    file = work / "request.json"
    file.write_text(json.dumps(request, indent=1), encoding="utf-8")
    run(step, [step.toolchain["python"], program, file.name], work)


def run(
    step: StepContext, argv: Sequence[str], work: Path, extra: Mapping[str, str] | None = None
) -> None:
    """Run the compiler's Python; its output goes to the step's log. Raises StepError."""
    environment = {**os.environ, **(extra or {})}
    environment.pop("PYTHONPATH", None)
    if step.toolchain["own"]:
        # The compiler was found on this Python's path, which a new one must have too.
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        argv,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step.log.info("%s", line.rstrip())
            last.append(_told(step, line.rstrip()))
    if process.returncode != 0:
        name = f"{step.toolchain['distribution']} {step.toolchain['version']}"
        said = "\n".join(f"  {line}" for line in last if line)
        raise StepError(
            f"{step.name}: {name} failed (exit code {process.returncode}); it said last:\n{said}",
            remedy=f"`qbuild log {step.name}` shows all that it said.",
        )


def _told(step: StepContext, line: str) -> str:
    """What a line says to a person. With QBCOMPILER_JSONL=1 it is an event in JSON; progress
    is passed on."""
    if not line.startswith("{"):
        return line
    try:
        event = json.loads(line)
    except ValueError:
        return line
    if not isinstance(event, dict):
        return line
    done, total = event.get("current"), event.get("total")
    if event.get("type") == "progress" and isinstance(done, int) and isinstance(total, int):
        step.progress(done, total, "steps")
        return ""
    return str(event.get("message", line))
