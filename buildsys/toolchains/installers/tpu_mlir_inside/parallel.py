"""GNU parallel, as far as TPU-MLIR's converter calls it, with an own number of jobs, a limit of
memory, results that are kept, and one line of JSON for each net that is done.

    parallel -j N --halt now,fail=1 --progress --joblog FILE < TASKS

A task is a line `(pushd NET && model_deploy.py ... && popd ) > NET.log`; nothing is shared
between tasks but files that were there before. $QBUILD_NETS names a JSON file:
    jobs: tasks at a time; memory: bytes for all of them, or null
    kept: a folder of results, or null; salt: what of the compiler decides bytes
Standard library only: this runs in the compiler's Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

TASK = re.compile(r"\(pushd (\S+) +&& +(model_deploy\.py .*?) +&& popd +\) > (\S+)\.log\s*")
WEIGHTS = re.compile(rb'module\.weight_file = "([^"]+)"')
# Options of which every effect is in the command line or in files that are digested.
SAFE = frozenset(
    f"--{name}"
    for name in (
        "mlir", "chip", "model", "addr_mode", "num_core", "num_device", "quantize",
        "q_group_size", "quant_input", "quant_output", "quant_output_bf16", "high_precision",
        "q_symmetric", "dynamic", "disable_gdma_check", "disable_layer_group",
        "save_io_alone_config", "use_io_alone_config",
    )
)  # fmt: skip
# Memory that a task may take before any has told otherwise: of the programs, and per byte of
# weights.
BASE, PER_BYTE = 300 << 20, 5.0


class Task(NamedTuple):
    """One net. results: the files that others need of it, in its folder."""

    line: str
    net: str
    words: list[str]
    results: list[str]
    weights: int


def main() -> int:
    with open(os.environ["QBUILD_NETS"], encoding="utf-8") as file:
        settings = json.load(file)
    tasks = [task_of(line) for line in sys.stdin if line.strip()]
    waiting = []
    for task in tasks:
        if take_kept(task, settings):
            tell(net=task.net, total=len(tasks), kept=True, seconds=0.0)
        else:
            waiting.append(task)
    return run_all(waiting, len(tasks), settings)


def task_of(line: str) -> Task:
    """The task that a line of the converter's asks for."""
    found = TASK.fullmatch(line)
    if found is None:
        raise SystemExit(f"parallel: this is no task of the converter's: {line}")
    net, words = found[1], shlex.split(found[2])
    results = [words[words.index("--model") + 1]]
    if "--save_io_alone_config" in words:
        results.append(words[words.index("--save_io_alone_config") + 1])
    weights = weight_file(net, words)
    return Task(line, net, words, results, os.path.getsize(weights) if weights else 0)


def weight_file(net: str, words: list[str]) -> str:
    """The file of weights that a net's description names; "" where it names none."""
    with open(os.path.join(net, words[words.index("--mlir") + 1]), "rb") as file:
        named = WEIGHTS.search(file.read(1 << 16))
    # Heads that only choose a token have no weights, and say None.
    return os.path.join(net, named[1].decode()) if named and named[1] != b"None" else ""


def run_all(waiting: list[Task], total: int, settings: dict[str, Any]) -> int:
    """Run tasks as there is room; after the first failure the others are ended."""
    running: dict[int, tuple[Task, Any, float]] = {}
    ratio = 1.0
    while waiting or running:
        while waiting and has_room(
            waiting[0], [task for task, _, _ in running.values()], ratio, settings
        ):
            task = waiting.pop(0)
            process = start(task)
            running[process.pid] = (task, process, time.time())
        pid, status, usage = os.wait4(-1, 0)
        if pid not in running:
            continue
        task, process, began = running.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            tell(net=task.net, failed=process.returncode)
            for other in running:
                os.killpg(other, signal.SIGKILL)
            return 1
        ratio = max(ratio, usage.ru_maxrss * 1024 / need(task, 1.0))
        keep(task, settings)
        seconds = round(time.time() - began, 2)
        tell(net=task.net, total=total, kept=False, seconds=seconds, memory=usage.ru_maxrss * 1024)
    return 0


def has_room(task: Task, running: list[Task], ratio: float, settings: dict[str, Any]) -> bool:
    if not running:
        return True
    memory = settings.get("memory")
    wanted = sum(need(each, ratio) for each in [task, *running])
    return len(running) < settings["jobs"] and (memory is None or wanted <= memory)


def need(task: Task, ratio: float) -> float:
    """Bytes that a task may take at its peak."""
    return (BASE + PER_BYTE * task.weights) * ratio


def start(task: Task) -> Any:
    """Its standard output goes to NET.log by the line itself, its errors to NET.err."""
    with open(f"{task.net}.err", "wb") as errors:
        argv = ["bash", "-c", task.line]
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )


def tell(**event: Any) -> None:
    print(json.dumps({"qbuild": event}), flush=True)


def take_kept(task: Task, settings: dict[str, Any]) -> bool:
    """Put the results of an earlier compilation of the very same net in place, if there are."""
    place = kept_place(task, settings)
    if place is None or not os.path.isdir(place):
        return False
    with open(os.path.join(place, "digests.json"), encoding="utf-8") as file:
        digests = json.load(file)
    for name in task.results:
        if digest_of(os.path.join(place, name)) != digests[name]:
            shutil.rmtree(place, ignore_errors=True)
            return False
    for name in task.results:
        link_or_copy(os.path.join(place, name), os.path.join(task.net, name))
    os.utime(place)
    return True


def keep(task: Task, settings: dict[str, Any]) -> None:
    """Keep the results for another build. A full disk is no reason to fail."""
    place = kept_place(task, settings)
    if place is None or os.path.isdir(place):
        return
    fresh = f"{place}.{os.getpid()}"
    try:
        os.makedirs(fresh)
        for name in task.results:
            link_or_copy(os.path.join(task.net, name), os.path.join(fresh, name))
        digests = {name: digest_of(os.path.join(fresh, name)) for name in task.results}
        with open(os.path.join(fresh, "digests.json"), "w", encoding="utf-8") as file:
            json.dump(digests, file)
        os.rename(fresh, place)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)


def kept_place(task: Task, settings: dict[str, Any]) -> str | None:
    """Where results are kept: named by everything that decides them. None where that is not
    all known, or nothing is kept."""
    options = {word for word in task.words if word.startswith("--")}
    if settings.get("kept") is None or not options <= SAFE:
        return None
    words = list(task.words)
    files = list(files_of(task))
    if "--use_io_alone_config" in words:
        words[words.index("--use_io_alone_config") + 1] = "in files"
    content = [settings["salt"], words, [digest_of(path) for path in files]]
    name = hashlib.blake2b(json.dumps(content).encode(), digest_size=20).hexdigest()
    return os.path.join(settings["kept"], name)


def files_of(task: Task) -> Iterator[str]:
    """What a task reads: the net, its weights, the places of inputs that an earlier one chose."""
    yield os.path.join(task.net, task.words[task.words.index("--mlir") + 1])
    weights = weight_file(task.net, task.words)
    if weights:
        yield weights
    if "--use_io_alone_config" in task.words:
        yield task.words[task.words.index("--use_io_alone_config") + 1]


DIGESTS: dict[str, str] = {}


def digest_of(path: str) -> str:
    """BLAKE2 of a file; each is read once, as many nets share their weights."""
    if path not in DIGESTS:
        hasher = hashlib.blake2b(digest_size=32)
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                hasher.update(part)
        DIGESTS[path] = hasher.hexdigest()
    return DIGESTS[path]


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    sys.exit(main())
