"""Runs a compiler or make for a step: all that it says goes to the log, the end into the error."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError

if TYPE_CHECKING:
    from buildsys.rules.spec import StepContext

LAST_LINES = 8


def run_program(
    step: StepContext,
    argv: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    echo: str | None = None,
) -> None:
    """Run a program in `folder`. environment: further variables. echo: lines with this in them
    are commands that the program repeats: for the log, not for the message.

    Raises StepError for one that cannot be started or fails, with what it said last.
    """
    words = [os.fspath(word) for word in argv]
    step.log.info("$ %s", " ".join(words))
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise StepError(f"{words[0]} cannot be started: {error.strerror}") from error
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            step.log.info("%s", line.rstrip())
            if line.strip() and (echo is None or echo not in line):
                last.append(line.rstrip())
    if process.returncode != 0:
        said = "\n".join(f"  {line}" for line in last)
        raise StepError(
            f"{Path(words[0]).name} failed (exit code {process.returncode}); it said last:\n{said}",
            remedy=f"The whole of it is in the log: qbuild log {step.name}",
        )
