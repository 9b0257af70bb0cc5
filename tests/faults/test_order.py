"""What a loss of power leaves: the order in which things reach the disk.

No kill shows it, for what was written is there afterwards. So the operations of a whole build
are looked at one by one, as they were called.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.project import write_project
from tests.faults.world import References, World, random_content

EVERYTHING = "everything"


def operations(world: World, log: Path) -> list[list[str]]:
    """Of one build: each operation's name and words."""
    world.must(QBUILD_FAULT_LOG=str(log))
    return [line.split(" ") for line in log.read_text().splitlines()]


def test_outputs_and_intent_are_on_disk_before_a_rename_and_renames_before_the_next_step(
    references: References, tmp_path: Path
) -> None:
    content = random_content(random.Random("order"))
    world = World(tmp_path / "project", content, references, None)
    write_project(world.folder, content)
    journal = str(world.build / ".qbuild/journal")
    on_disk: set[str] = set()
    begun: list[str] = []  # folders that a rename or a done line must still reach the disk in
    renames = 0
    for name, *words in operations(world, tmp_path / "log"):
        if name == "pwrite" and words[0] == journal:
            on_disk.discard(journal)
            if '"kind":"intent"' in " ".join(words):
                assert begun == [], "the last group was not on disk when the next one began"
                on_disk.clear()
            else:
                begun.append(journal)
        elif name == "fsync":
            on_disk.add(words[0])
            begun = [each for each in begun if each != words[0]]
        elif name == "syncfs":
            on_disk.add(EVERYTHING)
            begun.clear()
        elif name in ("rename", "renameat2") and "/staging/" in words[0]:
            renames += 1
            assert journal in on_disk, "the intent may be lost, and the rename not"
            assert words[0] in on_disk or EVERYTHING in on_disk
            begun.append(str(Path(words[1]).parent))
        elif name == "sendall":
            assert begun == [], "a step was started on what a loss of power may take away"
    assert begun == []
    assert renames >= len(content["artifacts"])
