"""A rule for tests: does what its options say, in the step's own process."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from buildsys.errors import StepError
from buildsys.formats.errors import FormatError
from buildsys.rules.spec import StepContext


def make(step: StepContext) -> None:
    globals()[str(step.options["do"])](step)


def tell(step: StepContext) -> None:
    print("printed")
    os.write(2, b"written\n")
    step.log.info("logged")
    for number in range(1, 5001):
        step.progress(number, 5000, "tensors")
    step.note("fallback", {"lm_head": "Q8_0"})
    step.note("figures", [1, 2.5])
    step.warn("something is odd")
    step.out.write_text("made")


def look(step: StepContext) -> None:
    item = step.one("model")
    paths = {name: str(path) for name, path in item.paths.items()}
    step.note("input", [item.name, item.kind, paths, item.digest, dict(item.options)])
    step.note("outputs", {name: str(path) for name, path in step.outputs.items()})
    step.note("step", [step.name, step.threads, step.device])
    step.note("environ", dict(os.environ))
    step.note("place", [str(Path.cwd()), sys.stdin.read()])
    step.note("session", [os.getpid(), os.getsid(0)])
    step.note("hash", hash("qbuild"))


def threads(step: StepContext) -> None:
    had_torch = "torch" in sys.modules
    import torch

    matrix = torch.rand(600, 600)
    matrix @ matrix
    step.note("had_torch", had_torch)
    step.note("threads", [torch.get_num_threads(), len(list(Path("/proc/self/task").iterdir()))])
    step.note("deterministic", torch.are_deterministic_algorithms_enabled())


def person(step: StepContext) -> None:
    raise StepError(f"{step.name}: 'x' is not a model", remedy="give a folder")


def other_family(step: StepContext) -> None:
    raise FormatError("tensor 'w': truncated")


def bug(step: StepContext) -> None:
    print(step.options["no such option"])


def memory(step: StepContext) -> None:
    bytearray(1 << 60)


def torch_memory(step: StepContext) -> None:
    import torch

    torch.empty(1 << 50)


def leave(step: StepContext) -> None:
    sys.exit(7)


def vanish(step: StepContext) -> None:
    os._exit(0)


def die(step: StepContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unspeakable(step: StepContext) -> None:
    step.note("path", step.out)


def hang(step: StepContext) -> None:
    print("ready", flush=True)
    signal.pause()


def long_words(step: StepContext) -> None:
    step.note("long", "x" * 3_000_000)


def nothing(step: StepContext) -> None:
    step.out.touch()


def wait_a_little(step: StepContext) -> None:
    """Long enough for several looks at its memory, most of them when nothing has changed."""
    block = bytearray(b"x" * (50 << 20))
    status = Path("/proc/self/status").read_text()
    step.note("anonymous", int(status.split("RssAnon:")[1].split()[0]) << 10)
    ends = time.monotonic() + 0.4
    while time.monotonic() < ends:
        os.sched_yield()
    del block
