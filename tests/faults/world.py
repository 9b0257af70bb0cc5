"""One project folder, the real `qbuild` in it, and what must hold after any fault.

`recover` is the heart of every scenario: the same command again, and then the bytes of an
undisturbed build, no finished step done twice, nothing left over.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from buildsys.engine.folder import BuildFolder
from buildsys.engine.journal import Entries, read_journal
from buildsys.engine.local import process_tree
from tests.faults import project

ROOT = Path(__file__).resolve().parents[2]
INSTANTS = Path(__file__).parent / "instants"
TIMEOUT = 600.0  # nothing takes that long; it ends what hangs
STEPS = 6
HALF_WRITTEN = re.compile(r"\.(\d+|new)$")  # what qbuild writes beside before it renames


def compile_once() -> None:
    """Every qbuild of a fresh clone would compile all that it imports: half of a small build."""
    compileall.compile_dir(ROOT / "buildsys", quiet=2)


class Violation(AssertionError):
    """A promise that was not kept."""


class Skip(Exception):
    """This machine cannot have this fault; the text says why."""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


class Finished(NamedTuple):
    """A step whose journal line is whole: its key, when it ended, and inodes of its outputs."""

    key: str
    at: float
    inodes: Mapping[str, int]

    def again(self, now: Finished | None) -> bool:
        """Was the same done once more?"""
        return now is not None and now.key == self.key and now != self


class World:
    """A project, and counts of what went wrong in it.

    folder: where qbuild runs; seen: the same folder as this process sees it, which differs
    where it lies in another mount namespace (`prefix` enters that). cleaned: were artifacts
    removed by `qbuild clean`? round: which one of its
    fault's this is; few: how many instants a scenario may take of all, 0 for all.
    """

    def __init__(
        self, folder: Path, content: dict[str, Any], references: References, seen: Path | None
    ) -> None:
        self.folder = folder
        self.seen = folder if seen is None else seen
        self.content = content
        self.references = references
        self.words: dict[str, str] = dict.fromkeys(project.SOURCES, "one")
        self.states = [dict(self.words)]
        self.store: Path | None = None
        self.prefix: tuple[str, ...] = ()
        self.command: tuple[str, ...] = ("all", project.RECIPE, "-j", "3", "-v")
        self.extra: dict[str, str] = {}
        self.cleaned = False
        self.round = 0
        self.few = 0
        self.instants = 0
        self.differing: list[str] = []
        self.repeated: list[str] = []
        self.left_over: list[str] = []

    # Running it

    @property
    def build(self) -> Path:
        """The build folder, as this process sees it."""
        return self.seen / "build/faults"

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        own = {
            "QBUILD_CACHE": "" if self.store is None else str(self.store),
            "QBUILD_CACHE_KEY": "ab" * 32,
            "COLUMNS": "80",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(ROOT),
        }
        if any(name.startswith("QBUILD_FAULT") for name in more):
            own["PYTHONPATH"] = f"{INSTANTS}:{ROOT}"
        return {**os.environ, **own, **self.extra, **more}

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """Start qbuild; the command of this world without words. more: environment variables."""
        arguments = words or self.command
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "buildsys", *arguments],
            cwd=self.folder if not self.prefix else None,
            env=self.environment(more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def qbuild(self, *words: str, **more: str) -> Done:
        """Run it to its end."""
        return self.ended(self.start(*words, **more))

    def ended(self, process: subprocess.Popen[str]) -> Done:
        """What a process that is to end by itself had to say."""
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise Violation(f"still running after {TIMEOUT:g} s:\n{out}{err}") from None
        if "Traceback" in err:
            raise Violation(f"a traceback:\n{err}")
        return Done(process.returncode, out, err)

    def must(self, *words: str, code: int = 0, **more: str) -> Done:
        """Run it; it must end with this exit code."""
        done = self.qbuild(*words, **more)
        expect(done.code == code, f"exit code {done.code} and not {code}: {done.out}{done.err}")
        return done

    # What it says of itself

    def journal(self) -> Entries:
        return read_journal(BuildFolder(str(self.build)).own("journal"))

    def finished(self) -> dict[str, Finished]:
        """Steps whose lines are whole and that no newer intent has opened again."""
        entries = self.journal()
        return {
            name: Finished(line["key"], line["at"], self._inodes(line["outputs"]))
            for name, line in entries.done.items()
            if name not in entries.open and not self._is_removed(name, line["outputs"])
        }

    def _is_removed(self, step: str, outputs: Sequence[str]) -> bool:
        """Temporary artifacts are removed after use, and what was cleaned must come back."""
        may_be_gone = self.cleaned or self.content["artifacts"][step].get("temporary", False)
        places = (self.build / path.rstrip("/") for path in outputs)
        return bool(may_be_gone and not all(map(os.path.lexists, places)))

    def _inodes(self, outputs: Sequence[str]) -> dict[str, int]:
        found = {}
        for path in outputs:
            with contextlib.suppress(FileNotFoundError):
                found[path] = os.lstat(self.build / path.rstrip("/")).st_ino
        return found

    # What must hold

    def recover(self, *, spoilt: Sequence[str] = ()) -> Done:
        """The same command again; everything must be right then. spoilt: steps that somebody
        has given a reason to run again."""
        before = self.finished() if (self.build / ".qbuild/journal").exists() else {}
        done = self.must()
        self.compare()
        after = self.finished()
        for name, was in before.items():
            if name not in spoilt and was.again(after.get(name)):
                self.repeated.append(name)
        self._look_for_leftovers()
        self.settle()
        expect(spoilt or not self.journal().damaged, "the journal is damaged")
        return done

    def settle(self) -> None:
        """Raises Violation for what was found so far."""
        if self.differing or self.repeated or self.left_over:
            raise Violation(
                f"differing: {self.differing}; repeated: {self.repeated}; "
                f"left over: {self.left_over}"
            )

    def compare(self) -> None:
        """Every artifact has the bytes and the mode of an undisturbed build, and none is more."""
        wanted = self.references.of(self.content, self.words)
        found = contents(self.build)
        self.differing += sorted(
            path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)
        )

    def nothing_half(self) -> None:
        """What lies under a final name is whole: as the undisturbed build of one or another
        state of the sources has it."""
        states = [self.references.of(self.content, words) for words in self.states]
        for path, entry in contents(self.build).items():
            if all(state.get(path) not in (None, entry) for state in states):
                self.differing.append(path)
        self.settle()

    def _look_for_leftovers(self) -> None:
        own = self.build / ".qbuild"
        self.left_over += [f"staging/{each.name}" for each in (own / "staging").iterdir()]
        self.left_over += [each.name for each in own.iterdir() if HALF_WRITTEN.search(each.name)]

    @contextlib.contextmanager
    def told(self, where: str) -> Iterator[None]:
        """Say in a violation where it was found."""
        try:
            yield
        except Violation as violation:
            raise Violation(f"{where}: {violation}") from violation

    # Changing it

    def keep(self, where: Path) -> None:
        """Remember the whole folder as it is, hard links included."""
        subprocess.run(["cp", "-a", str(self.seen), str(where)], check=True)

    def bring_back(self, where: Path) -> None:
        shutil.rmtree(self.seen)
        subprocess.run(["cp", "-a", str(where), str(self.seen)], check=True)

    def edit_source(self, name: str, word: str) -> None:
        project.write_source(self.seen, name, word)
        self.words[name] = word
        self.states.append(dict(self.words))

    def steps_reading(self, source: str) -> set[str]:
        return {
            name
            for name, artifact in self.content["artifacts"].items()
            if source in artifact.get("inputs", {}).values()
        }


class References:
    """Undisturbed builds, by recipe and words of the sources; each is made once, and kept below
    a folder that several processes may share."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, dict[str, Entry]] = {}

    def of(self, content: dict[str, Any], words: Mapping[str, str]) -> dict[str, Entry]:
        key = blake3(f"{content} {sorted(words.items())}".encode()).hexdigest(8)
        if key not in self._made:
            kept = self._root / f"undisturbed-{key}.json"
            if not kept.exists():
                beside = kept.with_suffix(f".{os.getpid()}")
                beside.write_text(json.dumps(self._build(content, words)))
                beside.replace(kept)
            rows = json.loads(kept.read_text())
            self._made[key] = {path: Entry(*row) for path, row in rows.items()}
        return self._made[key]

    def _build(self, content: dict[str, Any], words: Mapping[str, str]) -> dict[str, Entry]:
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            world = World(Path(folder, "project"), content, self, None)
            project.write_project(world.folder, content)
            for name, word in words.items():
                project.write_source(world.folder, name, word)
            world.must()
            return contents(world.build)


class Entry(NamedTuple):
    """What a path is: the digest of a file's bytes ("" for a folder), and may it be run?"""

    digest: str
    runs: bool


def contents(build: Path) -> dict[str, Entry]:
    """Every path of a build folder but qbuild's own."""
    found: dict[str, Entry] = {}
    for folder, folders, files in os.walk(build):
        if ".qbuild" in folders:
            folders.remove(".qbuild")
        for name in files:
            path = Path(folder, name)
            mode = os.lstat(path).st_mode
            digest = blake3(path.read_bytes()).hexdigest()
            found[str(path.relative_to(build))] = Entry(digest, bool(mode & 0o100))
        for name in folders:
            found[f"{Path(folder, name).relative_to(build)}/"] = Entry("", True)
    return found


def expect(holds: object, text: str) -> None:
    """Raises Violation with this text unless it holds."""
    if not holds:
        raise Violation(text)


@contextlib.contextmanager
def killed_in_the_end(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens, these do not stay."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def family(pid: int) -> list[int]:
    """All descendants of a process, without itself."""
    return process_tree.tree(pid)[1:]


def is_alive(pid: int) -> bool:
    state = process_tree.state(pid)
    return state is not None and state[0] != "Z"


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Signal one process that may be gone; None: there was none."""
    if pid is None or pid <= 1:  # those numbers mean more than one process
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def random_content(chance: random.Random) -> dict[str, Any]:
    return project.recipe(chance, project.random_nodes(chance, STEPS))
