"""The index: where each step's line is in the plan's file and in the journal, and what reads what.

A build of which little is stale reads the lines that it needs, in place of ten thousand. The
index is left with the standing answer, for the same plan and the same journal, and counts for
these only. It is disposable, and it is no truth: every line that it leads to has a checksum and
names its step, and where anything disagrees the whole plan and the whole journal are read.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from buildsys.engine.blueprint import BEFORE_STEPS, plan_lines
from buildsys.engine.journal import Span, done_since, is_crowded, read_done
from buildsys.engine.own_file import replace_bytes
from buildsys.plan.cached import gates_from, steps_from

if TYPE_CHECKING:
    from typing import BinaryIO

    from buildsys.engine.journal import Line
    from buildsys.engine.staleness import Survey
    from buildsys.plan.graph import Gate, Json, Plan, Step

VERSION = 1
NOWHERE = Span(0, 0)
LINES_OF_STEP = 2  # that a commit writes
NUMBER = "Q"  # of the columns: eight bytes, in this machine's order


class Columns(NamedTuple):
    """By a step's number, its place in the plan: where its row is in the plan's file and the
    row's checksum; where its line is in the journal (size 0: it has none that counts).

    first, readers: the numbers of the steps that read what step n makes are
    readers[first[n]:first[n + 1]]; the sources follow behind the steps, in the plan's order.
    makers: the number of the step that makes an output, in the order of what the answer promises.
    """

    row: array[int]
    row_size: array[int]
    row_sum: array[int]
    line: array[int]
    line_size: array[int]
    first: array[int]
    readers: array[int]
    makers: array[int]


class Index(NamedTuple):
    """files, gates: of the plan, as its file has them. lines: of the journal, as many as there
    are at least."""

    columns: Columns
    files: Sequence[str]
    gates: Json
    lines: int

    @property
    def length(self) -> int:
        """How many steps there are; behind them, the numbers are those of sources."""
        return len(self.columns.row)

    def is_plain(self, number: int) -> bool:
        """Was the step fresh, and are its outputs there to stay?"""
        return self.columns.line_size[number] > 0

    @property
    def crowded(self) -> bool:
        """Is it time that the journal is read whole, and written anew?"""
        return is_crowded(self.lines, self.length)

    def gates_of_plan(self) -> tuple[Gate, ...]:
        return gates_from(self.gates, self.files)

    def downstream(self, numbers: Iterable[int]) -> list[int]:
        """The numbers of all steps that read, directly or not, what these steps and sources are;
        the steps among them included. In the plan's order."""
        first, readers = self.columns.first, self.columns.readers
        found = set(numbers)
        waiting = list(found)
        while waiting:
            number = waiting.pop()
            new = set(readers[first[number] : first[number + 1]]) - found
            found |= new
            waiting += new
        return sorted(number for number in found if number < self.length)

    def steps(self, plan: BinaryIO, numbers: Sequence[int]) -> dict[str, Step] | None:
        """These steps, of the plan's file; None where that is not as it was."""
        columns = self.columns
        rows = []
        for number in numbers:
            plan.seek(columns.row[number])
            text = plan.read(columns.row_size[number])
            if zlib.crc32(text) != columns.row_sum[number]:
                return None
            rows.append(json.loads(text))
        return steps_from(rows, self.files)

    def line(self, journal: BinaryIO, number: int, step: str) -> Line | None:
        """The journal's last line about a step; None where there is none, or another."""
        span = Span(self.columns.line[number], self.columns.line_size[number])
        return read_done(journal, span, step) if span.size else None


def write_index(path: str, index: Index, binding: Json) -> None:
    """binding: what it counts for. Raises OSError."""
    blob = b"".join(column.tobytes() for column in index.columns)
    header = {
        "version": VERSION,
        "binding": binding,
        "lengths": [len(column) for column in index.columns],
        "files": index.files,
        "gates": index.gates,
        "lines": index.lines,
    }
    content = json.dumps(header).encode() + b"\n" + blob
    replace_bytes(path, blake3(content).hexdigest().encode() + b"\n" + content)


def read_index(path: str, binding: Json) -> Index | None:
    """The index, if it was left for that and is whole."""
    try:
        with open(path, "rb") as file:
            digest, content = file.readline()[:-1], file.read()
    except OSError:
        return None
    if blake3(content).hexdigest().encode() != digest:
        return None
    head, _, blob = content.partition(b"\n")
    header = json.loads(head)
    if header["version"] != VERSION or header["binding"] != binding:
        return None
    columns, at = [], 0
    for length in header["lengths"]:
        column = array(NUMBER)
        column.frombytes(blob[at : at + length * column.itemsize])
        at += length * column.itemsize
        columns.append(column)
    return Index(Columns(*columns), header["files"], header["gates"], header["lines"])


def make_index(survey: Survey, plan_file: str, key: str, journal: str) -> Index | None:
    """The index of a plan and a journal as they are on the disk, after a build; None where they
    say something else than in memory. key: of the plan's file."""
    plan, entries = survey.plan, survey.entries
    text = plan_lines(plan_file, key)
    if text is None or len(text) != len(plan.steps) + 3 or not os.path.exists(journal):
        return None
    rows = _rows(plan, text)
    # Of another inode it was written anew since it was read.
    same = entries.inode == os.stat(journal).st_ino
    since = done_since(journal, entries.whole if same else 0)
    if rows is None or since is None:
        return None
    spans = [_span(survey, name, since) for name in plan.steps]
    readers = _readers(plan)
    columns = (
        *zip(*rows, strict=True),
        *zip(*spans, strict=True),
        [0, *accumulate(map(len, readers))],
        [number for each in readers for number in each],
        [
            number
            for number, (name, step) in enumerate(plan.steps.items())
            if survey.verdicts[name].state == "fresh"
            for _ in step.outputs
        ],
    )
    rest = json.loads(text[1].removesuffix(f"{BEFORE_STEPS}\n".encode()) + b"}")["plan"]
    lines = (entries.lines if same else 0) + LINES_OF_STEP * len(since)
    return Index(
        Columns(*(array(NUMBER, column) for column in columns)), rest["files"], rest["gates"], lines
    )


def _rows(plan: Plan, text: Sequence[bytes]) -> list[tuple[int, int, int]] | None:
    """Where each step's row is, its size and checksum. text: the lines of the plan's file."""
    at = len(text[0]) + len(text[1])
    rows = []
    for name, line in zip(plan.steps, text[2:-1], strict=True):
        row = line.rstrip(b",\n")
        if not row.startswith(f"[{json.dumps(name)},".encode()):
            return None
        rows.append((at, len(row), zlib.crc32(row)))
        at += len(line)
    return rows


def _span(survey: Survey, name: str, since: Mapping[str, Span]) -> Span:
    """Where the journal's line about a step is, if the step is one of those that are judged
    from the index: fresh, and there to stay."""
    verdict, line = survey.verdicts[name], survey.entries.done.get(name)
    if verdict.state != "fresh" or survey.plan.steps[name].temporary or line is None:
        return NOWHERE
    return since.get(name) or line.span or NOWHERE


def moved_lines(index: Index, numbers: Mapping[str, int], journal: str, start: int) -> Index | None:
    """The index after a build. numbers: of the steps that it may have made, by name; start: how
    long the journal was before. None where it says something of other steps."""
    since = done_since(journal, start)
    if since is None or not since.keys() <= numbers.keys():
        return None
    for name, span in since.items():
        index.columns.line[numbers[name]], index.columns.line_size[numbers[name]] = span
    return index._replace(lines=index.lines + LINES_OF_STEP * len(since))


def _readers(plan: Plan) -> list[list[int]]:
    """The numbers of the steps that read each step, and then each source."""
    numbers = {name: number for number, name in enumerate(plan.steps)}
    sources = {name: number for number, name in enumerate(plan.sources, len(numbers))}
    found: list[list[int]] = [[] for _ in range(len(numbers) + len(sources))]
    for number, step in enumerate(plan.steps.values()):
        refs = [ref for given in step.inputs.values() for ref in given]
        for read in {
            sources[ref.name] if ref.kind == "source" else numbers[plan.producer[ref.name]]
            for ref in refs
        }:
            found[read].append(number)
    return found
