"""The least that a Python program can do for a full build and keep qbuild's promises:

    python bench/floor.py graph.json

Each step in a folder and a session of its own and confined, its output digested and put in place,
a line about it written, and a wait for the disk for every hundred of them. No plan, no keys, no
up-to-date test, no recovery, no supervisor. Two steps at a time, in the order of the file.
"""

from __future__ import annotations

import _thread
import json
import os
import sys
from pathlib import Path

from buildsys.engine.local import landlock
from buildsys.identity import hash_file

JOBS, GROUP = 2, 100


def start(folder: str, argv: list[str]) -> int:
    """A confined program in `folder`; its pid."""
    found: list[int] = []
    over = _thread.allocate_lock()

    def run() -> None:
        landlock.confine((folder,))
        found.append(os.posix_spawn("/bin/sh", argv, {"PATH": os.environ["PATH"]}, setsid=True))
        over.release()

    over.acquire()
    _thread.start_new_thread(run, ())
    over.acquire()
    return found[0]


def main() -> None:
    root = Path.cwd()
    running: dict[int, tuple[str, str]] = {}
    free = [f"{root}/staging/{job}" for job in range(JOBS)]
    for folder in free:
        Path(folder).mkdir(parents=True)
    journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    done = 0

    def finish() -> None:
        nonlocal done
        pid, status = os.wait()
        folder, output = running.pop(pid)
        assert status == 0, output
        digest = hash_file(f"{folder}/{output}")
        os.rename(f"{folder}/{output}", f"{root}/{output}")  # noqa: PTH104 (no Path for nothing)
        os.write(journal, f"{output} {digest}\n".encode())
        free.append(folder)
        done += 1
        if done % GROUP == 0:
            os.fsync(journal)
            os.sync()

    for output, inputs in json.loads(Path(sys.argv[1]).read_text()):
        # What it reads may still run: then nothing starts before that has ended.
        while len(running) == JOBS or any(name in inputs for _, name in running.values()):
            finish()
        folder = free.pop()
        read = " ".join(f"{root}/{name}" for name in inputs)
        argv = ["sh", "-c", f"head -c 64 {read} > {folder}/{output}"]
        running[start(folder, argv)] = (folder, output)
    while running:
        finish()
    os.fsync(journal)
    os.sync()


if __name__ == "__main__":
    main()
