"""Faults: others use the same build folder, the same store or the same cache at the same time,
or what lies there is not what it should be."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.faults.killing import wait
from tests.faults.registry import fault
from tests.faults.tampering import flip, nothing_to_do
from tests.faults.world import World, expect, kill, killed_in_the_end

RESTORED = "restored"


@fault(rounds=20)
def two_or_more_builds_at_once(world: World, chance: random.Random) -> None:
    """They take turns, and every step is done once; one of them may be killed."""
    processes = []
    for _ in range(chance.choice((2, 2, 3))):
        processes.append(world.start())
        wait(processes[0], chance.uniform(0.0, 0.3))
    with killed_in_the_end(*processes):
        if chance.random() < 0.4:
            kill(processes.pop(0).pid)
        ends = [world.ended(process) for process in processes]
    expect(all(done.code == 0 for done in ends), f"{ends}")
    done_lines = (world.build / ".qbuild/journal").read_bytes().count(b'"kind":"done"')
    expect(done_lines == len(world.journal().done), f"{done_lines} lines: a step was done twice")
    world.recover()
    nothing_to_do(world)


@fault(rounds=20)
def readers_during_a_build(world: World, chance: random.Random) -> None:
    """status, why, list, check and -n answer, with no wait for the lock, and disturb nothing."""
    if chance.random() < 0.5:
        world.must()
        world.edit_source("src1", "two")
    process = world.start()
    with killed_in_the_end(process):
        while process.poll() is None:
            words = chance.choice((("status", "--json"), ("why", "end", "--json"), ("check",)))
            answer = world.must(*words[:1], world.command[1], *words[1:])
            if "--json" in words:
                json.loads(answer.out)
            wait(process, 0.05)
        done = world.ended(process)
    expect(done.code == 0, done.err)
    world.recover()
    nothing_to_do(world)


# The store and the shared cache


def with_cache(world: World) -> Path:
    """Give the world a store and a shared cache, and build: every step is in both then."""
    world.store = world.folder.parent / "store"
    world.command = (*world.command, "--cache", f"file://{world.folder.parent}/shared")
    world.must()
    return world.folder.parent / "shared"


def files_below(folder: Path) -> list[Path]:
    """Those that hold something: a lock has no bit to flip."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def second_checkout(world: World, *, own_store: bool) -> None:
    """The same project in another folder, with an empty build folder."""
    there = world.folder.parent / "second"
    shutil.copytree(world.folder, there, ignore=shutil.ignore_patterns("build"))
    world.folder = world.seen = there
    if own_store:
        world.store = world.folder.parent / "second-store"


@fault(rounds=10)
def second_checkout_with_an_empty_build_folder(world: World, chance: random.Random) -> None:
    """It gets every artifact from the shared cache and runs no step."""
    with_cache(world)
    second_checkout(world, own_store=True)
    done = world.must()
    expect(done.out.startswith("built 0, restored "), f"{done.out}{done.err}")
    world.compare()
    world.settle()
    nothing_to_do(world)


@fault(rounds=20)
def flipped_bit_in_the_store(world: World, chance: random.Random) -> None:
    """In any of its files, with its old times; it is noticed, and the bytes are right."""
    with_cache(world)
    world.command = world.command[:-2]  # the shared cache would hide it
    assert world.store is not None
    for path in chance.sample(files_below(world.store), 3):
        spoil_there(path, chance)
    # A linked artifact is the blob itself, and has changed with it.
    if chance.random() < 0.5:
        second_checkout(world, own_store=False)
    else:
        world.must("clean")
    world.recover(spoilt=list(world.content["artifacts"]))
    nothing_to_do(world)


def spoil_there(path: Path, chance: random.Random) -> None:
    """Another bit, or an end that is missing; times as they were."""
    found = path.stat()
    path.chmod(0o644)
    if chance.random() < 0.7:
        flip(path, chance)
    else:
        os.truncate(path, chance.randrange(found.st_size))
    path.chmod(found.st_mode)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@fault(rounds=20)
def poisoned_or_truncated_shared_cache(world: World, chance: random.Random) -> None:
    """A wrong blob or record is refused and said; the step runs, and what is right replaces it."""
    shared = with_cache(world)
    victims = files_below(shared)
    for path in chance.sample(victims, chance.randint(1, 3)):
        if chance.random() < 0.2:
            path.unlink()
        else:
            spoil_there(path, chance)
    second_checkout(world, own_store=True)
    world.recover()
    third = world.folder.parent / "third"
    shutil.copytree(world.folder, third, ignore=shutil.ignore_patterns("build"))
    world.folder = world.seen = third
    world.store = third.parent / "third-store"
    done = world.must()
    mended = done.out.startswith("built 0, ") and "warning" not in done.err
    expect(mended, f"it was not mended: {done.out}{done.err}")
    world.compare()
    world.settle()


@fault(rounds=10)
def dead_shared_cache(world: World, chance: random.Random) -> None:
    """One that refuses connections costs one warning; no step fails or waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world.store = world.folder.parent / "store"
    world.command = (*world.command, "--cache", f"http://127.0.0.1:{port}/cache")
    done = world.must()
    expect(done.err.count("warning") == 1, done.err)
    expect(RESTORED not in done.out, done.out)
    world.recover()


GC = """
import sys, time
from buildsys.cli.cache import keys_in_use
from buildsys.store.garbage import collect
from buildsys.store.local import Store
collect(Store(sys.argv[1]), keys_in_use, float(sys.argv[2]), int(sys.argv[3]), time.time() + 40 * 86400)
"""  # noqa: E501  (one call)


@fault(rounds=20)
def garbage_collected_in_the_middle_of_a_build(world: World, chance: random.Random) -> None:
    """As if all in the store were old: by a clock forty days ahead. What a build folder uses
    stays, and a build that loses what it was about to take makes it."""
    with_cache(world)
    world.command = world.command[:-2]
    used_by_first = world.folder
    second_checkout(world, own_store=False)
    if chance.random() < 0.5:
        world.edit_source("src0", "two")
    process = world.start()
    with killed_in_the_end(process):
        while process.poll() is None:
            collect(world, chance)
            wait(process, chance.uniform(0.0, 0.1))
        done = world.ended(process)
    expect(done.code == 0, done.err)
    world.recover()
    # The first folder's artifacts can all be had from the store again.
    world.folder = world.seen = used_by_first
    world.words = dict.fromkeys(world.words, "one")
    world.must("clean")
    done = world.must()
    expect(done.out.startswith("built 0, restored "), f"something was gone: {done.out}")
    world.compare()
    world.settle()


def collect(world: World, chance: random.Random) -> None:
    words = [str(world.store), str(chance.choice((0, 86400))), str(chance.choice((0, 10**9)))]
    done = subprocess.run(
        [sys.executable, "-c", GC, *words],
        env=world.environment({}),
        capture_output=True,
        text=True,
        check=False,
    )
    expect(done.returncode == 0, f"gc failed: {done.stderr}")
