"""Faults: a disk that is full, or read-only. A small tmpfs in a mount namespace of its own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.registry import fault
from tests.faults.world import Skip, World, contents, expect

PAGE = 4096
ROOM = "/mnt"
SETUP = 'mount -t tmpfs -o size="$1" tmpfs /mnt && echo ready && read -r end'


@contextmanager
def small_disk(world: World, size: str = "64m") -> Iterator[None]:
    """The world moves to a tmpfs of so many bytes. Raises Skip where that is not allowed."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        raise Skip("unshare and nsenter (util-linux) are not installed")
    holder = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", SETUP, "sh", size],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            raise Skip(f"no mount namespace here: {holder.stderr.read().strip()}")
        enter = ("nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials")
        inside = Path(f"/proc/{holder.pid}/root{ROOM}/project")
        subprocess.run(["cp", "-a", str(world.folder), str(inside)], check=True)
        world.prefix = (*enter, "--", "env", "-C", f"{ROOM}/project")
        world.folder, world.seen = Path(ROOM, "project"), inside
        yield
        with suppress(BrokenPipeError):
            holder.communicate("\n")


def in_room(world: World, *words: str) -> None:
    """Run a program in the world's mount namespace."""
    subprocess.run([*world.prefix, *words], check=True, capture_output=True)


def remount(world: World, how: str) -> None:
    """Mount the small disk anew; busy is one where the kernel has yet to close a file."""
    for _ in range(100):
        words = [*world.prefix, "mount", "-o", f"remount,{how}", ROOM]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        os.sched_yield()
    raise AssertionError(done.stderr)


@contextmanager
def filled(room: Path, pages: int) -> Iterator[None]:
    """So many pages of a disk are free, as long as this lasts."""
    filler = room / "filler"
    found = os.statvfs(room)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail - pages) * PAGE)
    try:
        yield
    finally:
        filler.unlink()


def fails_for_want_of_room(world: World) -> None:
    """It may still have fitted in; else the error says what is the matter, and nothing is half
    there."""
    done = world.qbuild()
    if done.code != 0:
        expect(done.code == 1, f"exit code {done.code}: {done.out}{done.err}")
        told = any(words in done.err for words in ("No space left on device", "is full: "))
        expect(told, f"the cause is not told:\n{done.err}")
        expect("error: " in done.err, done.err)
    if (world.build / ".qbuild/journal").exists():
        world.nothing_half()


@fault(rounds=40)
def full_disk_at_a_random_moment(world: World, chance: random.Random) -> None:
    """So many pages are left that staging, a log, the journal or a folder finds none."""
    with small_disk(world):
        if chance.random() < 0.5:
            world.must()
            world.edit_source("src0", "two")
        # Few pages: qbuild's own files; many: what steps write.
        pages = chance.choice((chance.randint(0, 60), chance.randint(0, 1500)))
        with world.told(f"{pages} pages free"):
            with filled(world.seen.parent, pages):
                fails_for_want_of_room(world)
                fails_for_want_of_room(world)
            world.recover()


@fault(rounds=20)
def disk_without_inodes(world: World, chance: random.Random) -> None:
    """There is room for bytes, and none for another file."""
    with small_disk(world):
        if chance.random() < 0.5:
            world.must()
            world.edit_source("src0", "two")
        used = os.statvfs(world.seen)
        number = used.f_files - used.f_ffree + chance.randint(1, 60)
        remount(world, f"nr_inodes={number}")
        with world.told(f"{number} inodes"):
            fails_for_want_of_room(world)
            remount(world, "nr_inodes=100000")
            world.recover()


@fault(rounds=10)
def full_disk_under_the_store(world: World, chance: random.Random) -> None:
    """It costs a warning and no build; what is in the store is whole. The shared cache is on the
    same disk."""
    large = world.folder
    with small_disk(world):
        room = world.seen.parent
        move_back(world, large)
        world.command = (*world.command, "--cache", f"file://{ROOM}/shared")
        world.store = Path(ROOM, "store")
        world.must()
        world.edit_source("src1", "two")
        pages = chance.randint(0, 300)
        with world.told(f"{pages} pages free in the store"):
            with filled(room, pages):
                done = world.must()
                expect(done.err.count("warning") <= 2, done.err)
                world.compare()
                world.settle()
            world.must("cache", "verify")
            world.cleaned = True
            world.must("clean")
            world.recover()


def move_back(world: World, large: Path) -> None:
    """The project goes back to the disk that it came from, and is seen in the room all the same."""
    place = f"{ROOM}/large"
    in_room(world, "mkdir", place)
    in_room(world, "mount", "--bind", str(large), place)
    world.folder, world.seen = Path(place), large
    world.prefix = (*world.prefix[:-1], place)


@fault(rounds=10)
def read_only_build_folder(world: World, chance: random.Random) -> None:
    """A build with nothing to do says so, readers answer, and another says why it cannot."""
    with small_disk(world):
        world.must()
        before = contents(world.build)
        remount(world, "ro")
        done = world.must()
        expect("nothing to do" in done.out, f"{done.out}{done.err}")
        for words in (("status",), ("why", "end"), ("status", "--json")):
            world.must(*words)
        remount(world, "rw")
        world.edit_source(chance.choice(sorted(world.words)), "two")
        remount(world, "ro")
        done = world.must(code=1)
        expect("read-only" in done.err, done.err)
        expect(contents(world.build) == before, "a read-only folder has changed")
        remount(world, "rw")
        world.recover()
