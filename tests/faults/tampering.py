"""Faults: somebody changes files, clocks or the journal, between builds or during one."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from pathlib import Path

from buildsys.engine.journal import CHECKSUM
from tests.faults.killing import process_named, wait
from tests.faults.registry import fault
from tests.faults.world import World, contents, expect, killed_in_the_end

NOTHING = "nothing to do"
YEAR = 365 * 86400
LATER = "10"  # seconds: what stat says is trusted of files that are older than two


def nothing_to_do(world: World, **more: str) -> None:
    done = world.must(code=0, **more)
    expect(NOTHING in done.out, f"something was done: {done.out}{done.err}")


@fault(rounds=10)
def output_edited_by_hand(world: World, chance: random.Random) -> None:
    """Its bytes, its length, its mode, its kind or its being there; it alone is made again."""
    world.must()
    nothing_to_do(world, QBUILD_FAULT_CLOCK=LATER)
    path = chance.choice(sorted(path for path in contents(world.build) if path[-1] != "/"))
    spoil(world.build / path, chance)
    owner = next(
        name
        for name, line in world.journal().done.items()
        for output in line["outputs"]
        if path == output or (output.endswith("/") and path.startswith(output))
    )
    with world.told(path):
        done = world.recover(spoilt=[owner, "brief"])
    made = {"built 1\n", "built 2\n"} if owner == "end" else {"built 1\n"}  # brief was removed
    expect(done.out in made, f"{path}: {done.out}{done.err}")


def spoil(path: Path, chance: random.Random) -> None:
    """Change a file, and give it its old times again: what `touch` can do, an editor can."""
    found = path.stat()
    how = chance.choice(("bit", "cut", "mode", "gone", "link", "empty"))
    path.chmod(found.st_mode | 0o200)
    if how == "bit":
        flip(path, chance)
    elif how == "cut":
        os.truncate(path, chance.randrange(found.st_size))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "mode":
        path.chmod(found.st_mode ^ 0o111)
    else:
        path.unlink()
        if how == "link":
            path.symlink_to("/etc/hostname")
    if how not in ("gone", "link"):
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def flip(path: Path, chance: random.Random) -> None:
    """One bit of a file's bytes, in place."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with path.open("r+b") as file:
        file.write(data)


@fault(rounds=10)
def content_swap_that_keeps_size_and_mtime(world: World, chance: random.Random) -> None:
    """`cp -p`, `rsync -t` and `tar` do that; both sources have one length and one mtime."""
    world.must()
    for name in world.words:
        os.utime(world.seen / f"{name}.txt", (1e9, 1e9))
    nothing_to_do(world, QBUILD_FAULT_CLOCK=LATER)
    name = chance.choice(sorted(world.words))
    path = world.seen / f"{name}.txt"
    before = path.stat()
    world.edit_source(name, "ten" if world.words[name] == "one" else "one")
    if chance.random() < 0.5:
        shutil.copy(path, world.seen / "copy")
        (world.seen / "copy").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    expect(same, "the scenario changed size or mtime")
    done = world.recover()
    expect(NOTHING not in done.out, f"it was not noticed: {done.out}")


@fault(rounds=10)
def clock_set_back(world: World, chance: random.Random) -> None:
    """By years, or ahead; nothing is rebuilt for it, and an edit is noticed all the same."""
    clocks = [str(chance.choice((-1, 1)) * chance.uniform(0, 20 * YEAR)) for _ in range(4)]
    world.must(QBUILD_FAULT_CLOCK=clocks[0])
    nothing_to_do(world, QBUILD_FAULT_CLOCK=clocks[1])
    nothing_to_do(world, QBUILD_FAULT_CLOCK=clocks[2])
    name = chance.choice(sorted(world.words))
    world.edit_source(name, "two")
    past = 1e8 if chance.random() < 0.5 else 4e9
    os.utime(world.seen / f"{name}.txt", (past, past))
    world.must(QBUILD_FAULT_CLOCK=clocks[3])
    world.recover()
    nothing_to_do(world)


@fault(rounds=20)
def input_edited_while_its_step_runs(world: World, chance: random.Random) -> None:
    """Before the step reads it, or after: what was made is not kept, or is stale the next time,
    and never passes for what the input as it was before would have made."""
    name = chance.choice(sorted(world.steps_reading("src0")))
    argv = world.content["artifacts"][name]["options"]["argv"]
    argv[2] = f"sleep 0.61; {argv[2]}"  # long enough to be met before it reads ...
    argv[4] = "0.62"  # ... and afterwards
    (world.seen / world.command[1]).write_text(json.dumps(world.content))
    if chance.random() < 0.5:
        world.must()
        world.edit_source("src0", "two")
    before = world.words["src0"]
    process = world.start()
    with killed_in_the_end(process):
        process_named(process, chance.choice((b"sleep\x000.61\x00", b"sleep\x000.62\x00")))
        world.edit_source("src0", "six")
        done = world.ended(process)
    if done.code != 0:
        expect("changed while the step ran" in done.err, done.err)
    if chance.random() < 0.6:
        world.edit_source("src0", before)
    world.recover()
    nothing_to_do(world)


@fault(rounds=20)
def input_edited_and_put_back_while_its_step_runs(world: World, chance: random.Random) -> None:
    """So that every look before and after finds the same bytes, and at times the same mtime: what
    was made is refused, and made again without being asked."""
    name = chance.choice(sorted(world.steps_reading("src0")))
    argv = world.content["artifacts"][name]["options"]["argv"]
    argv[2] = f"sleep 0.61; {argv[2]}"
    (world.seen / world.command[1]).write_text(json.dumps(world.content))
    source = world.seen / "src0.txt"
    found, before = source.stat(), world.words["src0"]
    process = world.start()
    with killed_in_the_end(process):
        process_named(process, b"sleep\x000.61\x00")
        world.edit_source("src0", "six")
        wait(process, chance.choice((0.0, 0.61)))  # until before or after the step reads it
        world.edit_source("src0", before)
        if chance.random() < 0.5:
            os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
        done = world.ended(process)
    expect(done.code == 1, f"it was not noticed: {done.out}{done.err}")
    expect("changed while the step ran" in done.err, done.err)
    world.recover()
    nothing_to_do(world)


@fault(rounds=20, alike=1)
def journal_cut_in_its_last_line(world: World, chance: random.Random) -> None:
    """As a loss of power in the middle of a write leaves it. Only the step of that line is done
    again. A round takes its share of every tenth byte, `few` of those where that is set; what is
    read of a journal that was cut at any byte is in tests/engine."""
    world.must()
    path = world.build / ".qbuild/journal"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    step = whole[last:].split(b'"step":"', 1)[1].partition(b'"')[0].decode()
    lengths = list(range(last, len(whole), 10))[world.round :: 20]
    if world.few:
        lengths = chance.sample(lengths, min(world.few, len(lengths)))
    for length in lengths:
        path.write_bytes(whole[:length])
        with world.told(f"cut at byte {length - last} of the last line"):
            done = world.recover(spoilt=[step, "brief"])
            expect(done.out in ("built 1\n", "built 2\n"), f"{done.out}{done.err}")
            expect(not world.journal().damaged, "a line was appended to the torn end")
        path.write_bytes(whole)  # outputs are the same bytes: this is the truth again
    world.instants += len(lengths)


@fault(rounds=10)
def journal_with_a_damaged_line_in_the_middle(world: World, chance: random.Random) -> None:
    """It is reported, and costs that step and nothing else."""
    world.must()
    path = world.build / ".qbuild/journal"
    lines = path.read_bytes().splitlines(keepends=True)
    number = chance.randrange(len(lines) - 1)
    line = bytearray(lines[number])
    line[chance.randrange(len(line) - 1)] ^= 1 << chance.randrange(7)
    if b"\n" in line[:-1]:
        return  # a newline would make two lines of it: another fault
    lines[number] = bytes(line)
    path.write_bytes(b"".join(lines))
    step = bytes(line).split(b'"step":"', 1)[-1].partition(b'"')[0].decode(errors="replace")
    done = world.recover(spoilt=[step, "brief", "end"])
    if NOTHING not in done.out:
        expect("the journal is damaged" in done.err, done.err)
    nothing_to_do(world)


@fault(rounds=5)
def journal_line_of_a_newer_version(world: World, chance: random.Random) -> None:
    """It is an error, and nothing is touched: neither the journal nor an artifact."""
    world.must()
    path = world.build / ".qbuild/journal"
    lines = path.read_bytes().splitlines(keepends=True)
    number = chance.randrange(len(lines))
    text = lines[number][CHECKSUM + 1 : -1].replace(b'{"v":1', b'{"v":%d' % chance.randint(2, 99))
    lines[number] = b"%08x %s\n" % (zlib.crc32(text), text)
    newer = b"".join(lines)
    whole = path.read_bytes()
    path.write_bytes(newer)
    world.edit_source("src0", "two")
    before = contents(world.build)
    done = world.must(code=1)
    expect("another version of qbuild" in done.err, done.err)
    expect(path.read_bytes() == newer, "the journal was changed")
    expect(contents(world.build) == before, "an artifact was changed")
    path.write_bytes(whole)
    world.recover()


@fault(rounds=10)
def project_moved_or_copied_elsewhere(world: World, chance: random.Random) -> None:
    """Nothing is rebuilt, also where times and inodes are others, or the store's links are gone."""
    if chance.random() < 0.5:
        world.store = world.folder.parent / "store"
        world.command = (*world.command, "--cache", f"file://{world.folder.parent}/shared")
    world.must()
    elsewhere = world.folder.parent / "else where"
    how = chance.choice(("move", "copy", "copy without times"))
    if how == "move":
        world.folder.rename(elsewhere)
    else:
        copy = shutil.copy2 if how == "copy" else shutil.copy
        shutil.copytree(world.folder, elsewhere, copy_function=copy)
    world.folder = world.seen = elsewhere
    nothing_to_do(world)
    world.recover()
