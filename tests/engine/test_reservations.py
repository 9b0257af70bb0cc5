"""Memory is never promised twice, and what the recipe says of a step is also its limit."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from buildsys.engine import memory
from buildsys.engine.build import Outcome, Request, Tools, build_what_is_stale
from buildsys.engine.display import QuietDisplay
from buildsys.engine.estimate import Tensors, tensors_in
from buildsys.engine.executor import Ended, Event, Order, Started
from buildsys.engine.journal import read_journal
from buildsys.engine.local.executor import LocalExecutor
from buildsys.engine.project import open_project
from buildsys.engine.schedule import HEADROOM

MIB = 1 << 20
LIMIT = 1000 * MIB


class Ledger(LocalExecutor):
    """Notes what is reserved at every moment, from the order of a step until its end."""

    def __init__(self, lock_fd: int) -> None:
        super().__init__(lock_fd)
        self.reserved: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.peak = 0
        self.together = 0
        self.started: set[str] = set()

    def submit(self, order: Order) -> None:
        assert order.claim is not None
        self.asked[order.id] = order.claim.memory
        self.reserved[order.id] = min(order.claim.memory, LIMIT)
        self.peak = max(self.peak, sum(self.reserved.values()))
        self.together = max(self.together, len(self.reserved))
        super().submit(order)

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        for event in events:
            if isinstance(event, Started):
                self.started.add(event.id)
            elif isinstance(event, Ended):
                del self.reserved[event.id]
        return events


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> tuple[Outcome, Ledger]:
    monkeypatch.chdir(folder)
    project = open_project("r.yaml", {}, None)
    ledgers: list[Ledger] = []

    def executor(lock_fd: int) -> Ledger:
        ledgers.append(Ledger(lock_fd))
        return ledgers[-1]

    tools = Tools(executor, QuietDisplay, lambda text: None)
    request = Request(tuple(project.plan.steps), frozenset(), **asked)
    _, _, outcome = build_what_is_stale(project, request, tools)
    assert outcome is not None
    return outcome, ledgers[-1]


def recipe(folder: Path, **resources: Any) -> None:
    """A step for each name, with these resources; each takes a moment."""
    steps = {
        name: {
            "rule": "command",
            "options": {"argv": ["sh", "-c", 'sleep 0.02; echo > "$0"', "${out}"]},
            "resources": each,
        }
        for name, each in resources.items()
    }
    content = {"qbuild": 1, "name": "r", "artifacts": steps}
    (folder / "r.yaml").write_text(json.dumps(content))


@pytest.mark.parametrize("seed", range(3))
def test_reservations_never_exceed_the_limit(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice((10, 90, 200, 333, 499, 501, 1000)) for _ in range(24)]
    recipe(tmp_path, **{f"s{n}": {"memory": f"{size}MiB"} for n, size in enumerate(sizes)})
    outcome, ledger = build(tmp_path, monkeypatch, jobs=6, memory=LIMIT)
    assert len(outcome.made) == 24 == len(ledger.started)
    assert ledger.peak <= LIMIT
    assert ledger.together > 1


def test_peaks_of_the_last_run_are_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With headroom; and together they stay below the limit, whatever was measured."""
    hold = "import sys, time; held = b'x' * (300 << 20); time.sleep(0.5); open(sys.argv[1], 'w')"
    program = [sys.executable, "-I", "-S", "-c", hold, "${out}"]
    steps = {f"s{n}": {"rule": "command", "options": {"argv": program}} for n in range(4)}
    content = {"qbuild": 1, "name": "r", "artifacts": steps}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    _, first = build(tmp_path, monkeypatch, jobs=1)
    assert set(first.asked.values()) == {0}  # of a program nobody knows anything beforehand
    held = {
        name: record["memory"]
        for name, record in read_journal(str(tmp_path / "build/r/.qbuild/journal")).done.items()
    }
    assert min(held.values()) > MIB
    _, ledger = build(tmp_path, monkeypatch, jobs=4, memory=LIMIT, forced=tuple(steps))
    assert ledger.asked == {name: int(memory * HEADROOM) for name, memory in held.items()}
    assert max(ledger.asked.values()) < ledger.peak <= LIMIT


def test_step_that_holds_more_than_the_recipe_says_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = "held = b'x' * (300 << 20)\nwhile True: pass"
    program = [sys.executable, "-I", "-S", "-c", hold, "${out}"]
    step = {"rule": "command", "options": {"argv": program}, "resources": {"memory": "100MiB"}}
    content = {"qbuild": 1, "name": "r", "artifacts": {"greedy": step}}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    outcome, _ = build(tmp_path, monkeypatch)
    assert "its limit is 125 MiB" in str(outcome.failures[0])


def test_steps_take_as_many_places_as_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path, **{f"s{n}": {"jobs": 3} for n in range(6)})
    assert build(tmp_path, monkeypatch, jobs=7)[1].together == 2


def test_figure_that_never_fits_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    recipe(tmp_path, small={"memory": "1MiB"}, large={"memory": "3GiB"})
    done = subprocess.run(
        [sys.executable, "-m", "buildsys", "all", "r.yaml", "--memory", "2GiB"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "large needs 3.0 GiB of memory" in done.stderr
    assert "there are 2.0 GiB for all steps" in done.stderr
    assert "r.yaml:1:" in done.stderr
    assert not (tmp_path / "build/r/small").exists()


def test_more_threads_are_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(tmp_path, s={"memory": "50MiB"})
    outcome, _ = build(tmp_path, monkeypatch)
    assert [str(each) for each in outcome.failures] == []
    assert outcome.made == ("s",)
    recipe(tmp_path, s={"memory": "60MiB", "threads": 2})
    outcome, _ = build(tmp_path, monkeypatch)
    assert [str(each) for each in outcome.failures] == []
    assert outcome.made == ("s",)
    recipe(tmp_path, s={"memory": "70MiB", "threads": 2, "jobs": 2, "licence": "x"})
    project = open_project("r.yaml", {}, None)  # the other resources are in no key
    request = Request(tuple(project.plan.steps), frozenset())
    tools = Tools(LocalExecutor, QuietDisplay, lambda text: None)
    assert build_what_is_stale(project, request, tools)[2] is None


def test_tensor_sizes_come_from_the_header(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [1000, 30], "data_offsets": [0, 60000]},
        "b": {"dtype": "I8", "shape": [7], "data_offsets": [60000, 60007]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)  # the data is not looked at
    assert tensors_in(str(path)) == Tensors(120000, 120028)
    (tmp_path / "w.pth").write_bytes(bytes(500))
    assert tensors_in(str(tmp_path / "w.pth")) == Tensors(0, 500)
    path.write_bytes(b"\xff" * 20)
    assert tensors_in(str(path)) == Tensors()


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_what_there_is(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group around limits too; clean pages of files are not held."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    inner = root / "outer/inner"
    inner.mkdir(parents=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    for folder, values in ((root / "outer", (900, 700)), (inner, ("max", 700))):
        for name, value in zip(names, values, strict=True):
            word = value * MIB if isinstance(value, int) else value
            (folder / f"memory.{name}").write_text(f"{word}\n")
        field = "total_inactive_file" if version == 1 else "inactive_file"
        (folder / "memory.stat").write_text(f"anon 5\n{field} {600 * MIB}\n")
    own = tmp_path / "own"
    own.write_text("4:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    monkeypatch.setattr(memory, "MOUNT", str(tmp_path))
    monkeypatch.setattr(memory, "OWN_GROUPS", str(own))
    assert memory.available_memory() == 800 * MIB
    assert memory.total_memory() == 900 * MIB
