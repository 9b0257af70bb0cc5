"""Runs TPU-MLIR's converter in a fresh folder, watches its nets, and says why one failed."""

from __future__ import annotations

import json
import re
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.toolchains.installers.tpu_mlir_environment import CONVERTER, compiler_environment

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.spec import StepContext

EVENT = '{"qbuild": '
BAR = "generate mlir:"  # of which every step is a line
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LAST_LINES = 8
# What a net's log says -> what a person does about it.
CAUSES = (
    ("ppl jit call failed", "A kernel could not be compiled: that takes cmake, make, gcc and g++."),
    ("Shape Verify failed", "The model's shapes are none that the converter knows."),
    ("std::bad_alloc", "It ran out of memory: give the step `resources: {threads: 1}`."),
    ("MemoryError", "It ran out of memory: give the step `resources: {threads: 1}`."),
    ("No space left on device", "The disk is full; a model takes ten times its size here."),
)
TELLING = re.compile(r"error:|Error\b|ERROR|failed|Assertion|LLVM|terminate called|Aborted", re.I)
DULL = re.compile(r"^\s*(#\d+ 0x|Stack dump|PLEASE submit|Can not open hash file|\[ *\])|^\d+%")


@dataclass
class Watch:
    """What the compiler has told so far."""

    done: int = 0
    kept: list[str] = field(default_factory=list)
    failed: dict[str, Json] | None = None
    largest: int = 0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))


def package_of(step: StepContext) -> Path:
    """The folder tpu_mlir of the toolchain."""
    return Path(step.toolchain["root"]) / "tpu_mlir"


def compile_model(
    step: StepContext, words: Sequence[str], model: Path, work: Path, nets: Mapping[str, object]
) -> Watch:
    """Compile into `work`/out. Raises StepError with what the net that failed said."""
    from buildsys.rules.sophgo.kernels import lend_kernels, take_kernels

    package = package_of(step)
    environment = compiler_environment(step.toolchain["python"], package, work / "around", nets)
    lend_kernels(step, work / "around" / "ppl")
    argv = [step.toolchain["python"], str(package / CONVERTER), "-m", str(model)]
    argv += [*words, "-o", str(work / "out")]
    watch = Watch()
    with subprocess.Popen(
        argv,
        cwd=work,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            _hear(step, watch, COLOUR.sub("", line).rstrip())
    take_kernels(step, work / "around" / "ppl")
    if process.returncode != 0:
        raise _failure(step, watch, process.returncode, work / "out")
    return watch


def _hear(step: StepContext, watch: Watch, line: str) -> None:
    if not line.startswith(EVENT):
        if line and not line.startswith(BAR):
            step.log.info("%s", line)
            watch.last.append(line)
        return
    event = json.loads(line)["qbuild"]
    if "failed" in event:
        watch.failed = event
        return
    watch.done += 1
    watch.largest = max(watch.largest, event.get("memory", 0))
    if event["kept"]:
        watch.kept.append(event["net"])
    how = "is kept from an earlier build" if event["kept"] else f"took {event['seconds']} s"
    step.log.info("net %s %s", event["net"], how)
    step.progress(watch.done, max(watch.done, event["total"]), "nets")


def _failure(step: StepContext, watch: Watch, code: int, out: Path) -> StepError:
    name = f"TPU-MLIR {step.toolchain['version']}"
    if watch.failed is None:
        said = "\n".join(f"  {line}" for line in watch.last)
        return StepError(
            f"{name} failed (exit code {code}) before it compiled a net; it said last:\n{said}",
            remedy=f"`qbuild log {step.name}` shows all that it said.",
        )
    net = watch.failed["net"]
    lines = list(_log_of(net, out))
    for line in lines:
        step.log.info("%s", line)
    text = "\n".join(lines)
    remedy = next((what for cause, what in CAUSES if cause in text), None)
    if watch.failed["failed"] in (-9, 137):
        remedy = "It was killed, as the system does where memory runs out."
    told = [line for line in lines if TELLING.search(line)][:3] or lines[-LAST_LINES:]
    said = "\n".join(f"  {line[:300]}" for line in told)
    return StepError(
        f"{name} could not compile the net {net}:\n{said}",
        remedy=" ".join(filter(None, (remedy, f"`qbuild log {step.name}` has the net's log."))),
    )


def _log_of(net: str, out: Path) -> Iterator[str]:
    """What a net's programs said, errors last, without what says nothing."""
    for suffix in (".log", ".err"):
        for path in sorted(out.glob(f"*/{net}{suffix}")):
            for line in re.split(r"[\r\n]+", path.read_text(encoding="utf-8", errors="replace")):
                if line.strip() and not DULL.search(line):
                    yield line.rstrip()


def made_bmodel(step: StepContext, out: Path) -> Path:
    """The one bmodel that the compiler has written: its name holds the time."""
    found = [path for path in out.glob("*.bmodel") if path.stat().st_size]
    if len(found) != 1:
        raise StepError(f"the compiler ended well and wrote {len(found)} bmodels")
    return found[0]
