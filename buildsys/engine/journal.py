"""The journal of a build folder: what was made, from what. The only truth about a build.

One line per event, appended: a checksum, a JSON object with what decides whether a step is
stale, and after a tab another with what people ask for, which few runs read.

    intent   outputs of a step are about to be put in place
    done     they are; the step's action key with its parts, and the digests of its outputs
    forget   a step is gone from the recipe and its outputs were removed

A step's last line counts. An intent that nothing follows was interrupted: the step is stale,
whatever lies under its outputs' names. A line that was torn by a crash is at the end, where
the next writer cuts it off; damage anywhere else is reported, and costs the steps that it hit.
When most lines no longer count, the next writer replaces the file by one of those that do.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from itertools import accumulate, compress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from buildsys.errors import QbuildError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

T = TypeVar("T")
VERSION = 1
CHECKSUM = 8  # hexadecimal digits, then a space
DECIDING = frozenset(
    {"v", "kind", "step", "fixed", "lookups", "inputs", "outputs", "wall", "memory", "at"}
)
# A journal of more lines than FEW, and of more than CROWD for each that counts, is rewritten.
FEW, CROWD = 100, 4


class JournalError(QbuildError):
    """The journal was written by a newer qbuild, or cannot be written."""


class Span(NamedTuple):
    """Where in a file a line is: its first byte, and how many there are without the newline."""

    at: int
    size: int


class Line(dict[str, "Json"]):
    """One line. What stands after the tab is parsed when it is first asked for.

    span: where it was read; None where it was not.
    """

    __slots__ = ("_rest", "span")

    def __init__(
        self, content: Mapping[str, Json], rest: bytes = b"", span: Span | None = None
    ) -> None:
        super().__init__(content)
        self._rest = rest
        self.span = span

    def __missing__(self, name: str) -> Json:
        if not self._rest:
            raise KeyError(name)
        self.update(json.loads(self._rest))
        self._rest = b""
        return self[name]

    def get(self, name: str, default: Json = None) -> Json:
        """As a dictionary's, of the whole line."""
        try:
            return self[name]
        except KeyError:
            return default


class Entries(NamedTuple):
    """A journal as read.

    done: step -> its last `done` line. open: steps whose last line is an intent.
    damaged: numbers of lines (from 1) that do not agree with their checksum, the torn end
    left out. whole: bytes up to that end. lines: how many there are up to it. inode: of the
    file; 0 where there was none.
    """

    done: dict[str, Line]
    open: dict[str, Line]
    damaged: tuple[int, ...]
    whole: int
    lines: int = 0
    inode: int = 0

    @property
    def crowded(self) -> bool:
        """Do so few of the lines count that it is worth writing those anew?"""
        return is_crowded(self.lines, len(self.done) + len(self.open))


def is_crowded(lines: int, counting: int) -> bool:
    """Do so few lines of a journal count that it is worth writing those anew?"""
    return lines > FEW + CROWD * counting


def encode(line: Mapping[str, Json]) -> bytes:
    """A line's bytes; no tab or newline stands in JSON but as an escape."""
    deciding = {name: value for name, value in line.items() if name in DECIDING}
    rest = {name: value for name, value in line.items() if name not in DECIDING}
    text = json.dumps({"v": VERSION, **deciding}, separators=(",", ":")).encode()
    if rest:
        text += b"\t" + json.dumps(rest, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: str) -> Entries:
    """Everything that the journal at `path` says; nothing where there is none.

    Needs no lock: what another process is appending looks like a torn end.
    Raises JournalError for a line of another version.
    """
    try:
        with open(path, "rb") as file:
            data, inode = file.read(), os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        data, inode = b"", 0
    return parse(data, path)._replace(inode=inode)


def parse(data: bytes, path: str) -> Entries:
    """As `read_journal`, of the bytes themselves."""
    lines = data.split(b"\n")
    torn = len(lines.pop())
    good = [_is_whole(line) for line in lines]
    while good and not good[-1]:
        torn += len(lines.pop()) + 1
        good.pop()
    damaged = tuple(number for number, each in enumerate(good, 1) if not each)
    ends = accumulate(len(line) + 1 for line in lines)
    spans = [Span(end - len(line) - 1, len(line)) for line, end in zip(lines, ends, strict=True)]
    texts = [line[CHECKSUM + 1 :] for line, each in zip(lines, good, strict=True) if each]
    halves = [text.partition(b"\t") for text in texts]
    done: dict[str, Line] = {}
    interrupted: dict[str, Line] = {}
    # One call for all lines: equal keys become one object, which halves time and memory.
    contents = json.loads(b"[%s]" % b",".join([head for head, _, _ in halves]))
    whole = compress(spans, good)
    for content, (_, _, rest), span in zip(contents, halves, whole, strict=True):
        if content["v"] != VERSION:
            raise JournalError(
                f"{path} was written by another version of qbuild (journal version "
                f"{content['v']}; this one knows {VERSION})",
                remedy="use that version, or begin anew with `qbuild clean --all`",
            )
        _apply(content, Line(content, rest, span), done, interrupted)
    return Entries(done, interrupted, damaged, len(data) - torn, len(good))


def done_since(path: str, start: int) -> dict[str, Span] | None:
    """Where the `done` lines are that were written behind the byte `start`, of steps whose last
    line they are. None where any line there is not whole, or says more than that a step was
    done."""
    found: dict[str, Span] = {}
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            text = line[:-1]
            if line[-1:] != b"\n" or not _is_whole(text):
                return None
            content = json.loads(text[CHECKSUM + 1 :].partition(b"\t")[0])
            if content["v"] != VERSION or content["kind"] == "forget":
                return None
            if content["kind"] == "done":
                found[content["step"]] = Span(start, len(text))
            else:
                found.pop(content["step"], None)
            start += len(line)
    return found


def read_done(file: BinaryIO, span: Span, step: str) -> Line | None:
    """The `done` line of a step at a place in an open journal; None where there is none."""
    file.seek(span.at)
    line = file.read(span.size)
    if len(line) != span.size or not _is_whole(line):
        return None
    head, _, rest = line[CHECKSUM + 1 :].partition(b"\t")
    content = json.loads(head)
    if (content["v"], content["kind"], content["step"]) != (VERSION, "done", step):
        return None
    return Line(content, rest, span)


def _is_whole(line: bytes) -> bool:
    try:
        return int(line[:CHECKSUM], 16) == zlib.crc32(line[CHECKSUM + 1 :])
    except ValueError:
        return False


def _apply(
    content: Mapping[str, Json], line: T, done: dict[str, T], interrupted: dict[str, T]
) -> None:
    """Note what a line changes; line: what to keep of it."""
    step, kind = content["step"], content["kind"]
    interrupted.pop(step, None)
    if kind == "done":
        done[step] = line
    elif kind == "intent":
        interrupted[step] = line
    elif kind == "forget":
        done.pop(step, None)


def _lines_that_count(data: bytes) -> list[bytes]:
    """Of a journal's bytes: each step's last `done` line, then the intents that are open."""
    done: dict[str, bytes] = {}
    interrupted: dict[str, bytes] = {}
    for line in filter(_is_whole, data.split(b"\n")):
        content = json.loads(line[CHECKSUM + 1 :].partition(b"\t")[0])
        _apply(content, line + b"\n", done, interrupted)
    return [*done.values(), *interrupted.values()]


class Journal:
    """The journal open for appending, by the holder of the build folder's lock.

    Invariant: the file ends with a whole line, or holds a torn end that `append` itself left
    and has cut off again.
    """

    def __init__(self, path: str, entries: Entries) -> None:
        """Cut the torn end off, set damaged lines aside (the file is kept), leave out what no
        longer counts where that is most of it, open.

        entries: what `read_journal` said after the lock was taken.
        """
        self._path = path
        anew = bool(entries.damaged) or entries.crowded
        if entries.damaged:
            self._keep_damaged()
        if anew:
            self._rewrite()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = os.lseek(self._fd, 0, os.SEEK_END)
        if not anew and self._end != entries.whole:
            self._cut(entries.whole)

    def append(self, lines: Iterable[Mapping[str, Json]]) -> None:
        """Write lines, all or none; not yet durable.

        Raises JournalError where the disk is full or fails.
        """
        data = b"".join(encode(line) for line in lines)
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._end + written)
        except OSError as error:
            self._cut(self._end)
            raise JournalError(
                f"cannot write {self._path}: {error.strerror}",
                remedy="make room and run the same command again: finished steps are kept",
            ) from error
        self._end += len(data)

    def sync(self) -> None:
        """What was appended survives a loss of power from here on."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _cut(self, length: int) -> None:
        os.ftruncate(self._fd, length)
        self._end = length

    def _keep_damaged(self) -> None:
        """The file as it is stays as "journal.damaged"."""
        kept = f"{self._path}.damaged"
        if os.path.lexists(kept):
            os.unlink(kept)
        os.link(self._path, kept)

    def _rewrite(self) -> None:
        """Put a file of the lines that count in its place, in one step; who reads it meanwhile
        has the one or the other, and they say the same."""
        with open(self._path, "rb") as file:
            data = file.read()
        rewritten = f"{self._path}.new"
        with open(rewritten, "wb") as file:
            file.writelines(_lines_that_count(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(rewritten, self._path)
        from buildsys.store.placing import fsync  # not for readers, who are in a hurry

        fsync(os.path.dirname(self._path))
