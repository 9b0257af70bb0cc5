"""Faults: something is killed, or told to stop, in the middle of a build."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.registry import fault
from tests.faults.world import World, expect, family, is_alive, kill, killed_in_the_end

FIRST, REBUILD, RESTORE = "first build", "rebuild", "from the store"
CROWDED = "rebuild that rewrites its journal"
WAYS = (FIRST, REBUILD, RESTORE, CROWDED)
SHARES = 10  # of the instants of a build; its rounds must be of one graph
SOON = 1.0  # seconds until the death of a step is told
GONE = 2.0  # seconds until all children of an interrupted build are gone
DEADLINE = 600.0  # nothing takes that long; it ends what hangs


def prepare(world: World, chance: random.Random, way: str) -> float:
    """A folder that is to be built in one of the ways; how long that may take."""
    if way == RESTORE:
        store = world.store = world.seen / "store"
        # The steps that took less than 0.1 s are not kept: a shared cache keeps all.
        world.command = (*world.command, "--cache", f"file://{world.folder}/shared")
    began = time.monotonic()
    if way != FIRST:
        world.must()
        took = time.monotonic() - began
    else:
        world.references.of(world.content, world.words)
        took = chance.uniform(0.3, 1.2)
    if way == CROWDED:
        journal = world.build / ".qbuild/journal"
        while not world.journal().crowded:
            journal.write_bytes(journal.read_bytes() * 2)
    if way in (REBUILD, CROWDED):
        world.edit_source(chance.choice(sorted(world.words)), chance.choice(("two", "three")))
    if way == RESTORE:
        world.cleaned = True
        world.must("clean", *chance.choice(((), ("--all",))))
        if chance.random() < 0.3:
            shutil.rmtree(store)  # and all comes from the shared cache
    return took


@fault(rounds=200)
def sigkill_of_qbuild_at_a_random_moment(world: World, chance: random.Random) -> None:
    """Once or several times in a row."""
    took = prepare(world, chance, chance.choice(WAYS))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        process = world.start()
        with killed_in_the_end(process):
            wait(process, chance.uniform(0.0, took))
            kill(process.pid)
    if chance.random() < 0.2:  # somebody thinks better of an edit
        world.edit_source(chance.choice(sorted(world.words)), "one")
    if (world.build / ".qbuild").exists():
        world.nothing_half()
    world.recover()


@fault(rounds=60)
def sigkill_of_everything_at_once(world: World, chance: random.Random) -> None:
    """qbuild, its supervisor, workers and steps, as far as they are seen: like a loss of power,
    but that what was written reaches the disk."""
    took = prepare(world, chance, chance.choice(WAYS))
    process = world.start()
    with killed_in_the_end(process):
        wait(process, chance.uniform(0.0, took))
        for pid in [*reversed(family(process.pid)), process.pid]:
            kill(pid)
    world.nothing_half()
    world.recover()


@fault(rounds=40)
def sigkill_of_the_supervisor(world: World, chance: random.Random) -> None:
    """qbuild says so, fails, keeps what is finished, and goes on when it is asked again."""
    prepare(world, chance, chance.choice((FIRST, REBUILD)))
    process = world.start()
    with killed_in_the_end(process):
        supervisor = first_child(process)
        wait(process, chance.uniform(0.0, 0.3))
        kill(supervisor)
        done = world.ended(process)
    if done.code != 0:
        expect(done.code == 1, f"exit code {done.code}: {done.err}")
        expect("supervises the steps ended unexpectedly (killed by SIGKILL)" in done.err, done.err)
    world.recover()


@fault(rounds=60)
def sigkill_of_a_worker_or_a_grandchild(world: World, chance: random.Random) -> None:
    """Any process below the supervisor: a step's own, a program that it has started, or the
    warm worker. The step fails and is told, or it makes the right bytes."""
    prepare(world, chance, chance.choice((FIRST, REBUILD)))
    process = world.start()
    with killed_in_the_end(process):
        first_child(process)
        wait(process, chance.uniform(0.0, 0.3))
        if until(process, lambda: len(family(process.pid)) > 1):
            victims = family(process.pid)[1:]
            kill(chance.choice(victims) if victims else None)
        done = world.ended(process)
    expect(done.code in (0, 1), f"exit code {done.code}: {done.err}")
    expect(done.code == 0 or "error: " in done.err, f"nothing was said: {done.err}")
    world.nothing_half()
    world.recover()


@fault(rounds=40)
def sigint_or_sigterm(world: World, chance: random.Random) -> None:
    """Exit code 130 or 143, finished steps kept, and no child is there two seconds later."""
    took = prepare(world, chance, chance.choice(WAYS))
    number = chance.choice((signal.SIGINT, signal.SIGTERM))
    process = world.start()
    with killed_in_the_end(process):
        until(process, lambda: holds_lock(world, process.pid))  # before that Python answers
        wait(process, chance.uniform(0.0, took))
        children = family(process.pid)
        process.send_signal(number)
        began = time.monotonic()
        done = world.ended(process)
        late = time.monotonic() - began
        left = [pid for pid in children if is_alive(pid)]
        expect(not left, f"these outlived qbuild: {left}")
    expect(late < GONE, f"it took {late:.2f} s to end after signal {number}")
    if done.code != 0:
        # Between two commands of Python's own start and end, the signal itself ends it.
        expect(done.code in (128 + number, -number), f"exit code {done.code}: {done.err}")
    world.nothing_half()
    world.recover()


@fault(rounds=10)
def step_that_dies_is_told_within_a_second(world: World, chance: random.Random) -> None:
    """With its signal, its peak memory and the end of its log; the best of three counts."""
    number = chance.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT))
    late = min(latency(world, f"dies{place}", number) for place in range(3))
    expect(late < SOON, f"told after {late:.2f} s")
    world.recover()


def latency(world: World, name: str, number: int) -> float:
    """Seconds from the death of a step to the line that tells it."""
    with an_artifact(world, name, "echo some last words; exec sleep 1000"):
        process = world.start("build", world.command[1], name)
        with killed_in_the_end(process):
            pid = process_named(process, b"sleep\x001000\x00")
            kill(pid, number)
            began = time.monotonic()
            assert process.stderr is not None
            said = ""
            while "error: " not in said and (line := process.stderr.readline()):
                said += line
            late = time.monotonic() - began
            said += process.stderr.read()
    expect(process.returncode == 1, f"exit code {process.returncode}: {said}")
    for words in (f"signal {signal.Signals(number).name}", "peak memory", "| some last words"):
        expect(words in said, f"{words!r} is not in {said}")
    return late


@fault(rounds=10)
def step_that_hangs_ends_at_its_timeout(world: World, chance: random.Random) -> None:
    """Also where it takes no notice of SIGTERM; its children end with it."""
    deaf = chance.random() < 0.3
    script = "trap '' TERM; " * deaf + "echo waiting; sleep 1000 & wait"
    with an_artifact(world, "hangs", script, timeout=chance.uniform(0.1, 0.4)):
        process = world.start("build", world.command[1], "hangs")
        with killed_in_the_end(process):
            child = process_named(process, b"sleep\x001000\x00")
            done = world.ended(process)
        expect(not is_alive(child), "a child of the step outlived it")
    expect(done.code == 1, f"exit code {done.code}: {done.err}")
    expect("ran longer than its timeout of" in done.err, done.err)
    expect("| waiting" in done.err, done.err)
    world.recover()


@contextmanager
def an_artifact(world: World, name: str, script: str, **more: object) -> Iterator[None]:
    """One more artifact in the recipe, as long as this lasts."""
    recipe = world.seen / world.command[1]
    before = recipe.read_text()
    content = dict(world.content)
    argv = ["sh", "-c", script, "sh", "${out}"]
    step = {"rule": "command", "options": {"argv": argv}, **more}
    content["artifacts"] = {**world.content["artifacts"], name: step}
    recipe.write_text(json.dumps(content))
    try:
        yield
    finally:
        recipe.write_text(before)


def holds_lock(world: World, pid: int) -> bool:
    try:
        return bool(json.loads((world.build / ".qbuild/lock").read_text())["pid"] == pid)
    except (OSError, ValueError):
        return False


# Every instant


@fault(rounds=len(WAYS) * SHARES, alike=len(WAYS))
def sigkill_at_every_instant(world: World, chance: random.Random) -> None:
    """Before each operation on files, and in the middle of each write, of one whole build;
    a round takes its share of them, `few` of those where that is set."""
    way = WAYS[world.round % len(WAYS)]
    prepare(world, chance, way)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch, "as it was")
        world.keep(kept)
        log = Path(scratch, "log")
        world.must(QBUILD_FAULT_LOG=str(log))
        operations = log.read_text().splitlines()
        instants = [str(place) for place in range(1, len(operations) + 1)]
        writes = (p for p, line in enumerate(operations, 1) if line.startswith(("write", "pwrite")))
        instants += [f"{place}.5" for place in writes]
        instants = instants[world.round // len(WAYS) :: SHARES]
        if world.few:
            instants = chance.sample(instants, min(world.few, len(instants)))
        for instant in instants:
            world.bring_back(kept)
            where = operations[int(float(instant)) - 1]
            with world.told(f"{way}, killed at instant {instant} ({where})"):
                killed_at(world, instant)
    world.instants += len(instants)


def killed_at(world: World, instant: str) -> None:
    process = world.start(QBUILD_FAULT_KILL=instant)
    with killed_in_the_end(process):
        process.communicate(timeout=DEADLINE)
    # Where steps fell into other groups this time, the build may have had fewer instants.
    expect(process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}")
    if (world.build / ".qbuild").exists():
        world.nothing_half()
    world.recover()


# Waiting for things


def wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Let it run so long, or until it ends."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def until(process: subprocess.Popen[str], holds: Callable[[], bool]) -> bool:
    """Wait for something while a process runs; did it come?"""
    deadline = time.monotonic() + DEADLINE
    while not holds():
        wait(process, 0.003)
        if process.poll() is not None:
            return holds()
        assert time.monotonic() < deadline, f"still waiting: {world_said(process)}"
    return True


def first_child(process: subprocess.Popen[str]) -> int | None:
    """qbuild's supervisor, once it is there; None where qbuild ended without one."""
    return family(process.pid)[0] if until(process, lambda: bool(family(process.pid))) else None


def process_named(process: subprocess.Popen[str], words: bytes) -> int:
    """The descendant that runs this command line, once it is there."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in family(process.pid) if command_line(pid) == words]
        return bool(found)

    assert until(process, there), f"no {words!r}: {world_said(process)}"
    return found[0]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def world_said(process: subprocess.Popen[str]) -> str:
    process.kill()
    return "".join(process.communicate())
