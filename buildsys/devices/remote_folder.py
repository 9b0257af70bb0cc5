"""A folder on a device: list, space, stat, send, digest, place, remove.

Final names only ever appear by a rename of a file that is complete, checked and on the disk.
Until then its bytes lie in `.qb/<sha256>.part`, named for what it will be: sending goes on from
its present size, and a part of something else is never continued.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from buildsys.devices.errors import CommandFailed, DeviceError
from buildsys.devices.transport import QUICK, Started, Transport, call, quoted

OWN = ".qb"
CHUNK = 1 << 20
# Device disks and their sha256sum are slower than this only where something is wrong.
SLOWEST = 5_000_000
STALLED = 60.0  # seconds without a byte
STAT = "%s|%i|%f|%y|%z|%n"

Sent = Callable[[int], None]  # bytes of the file that are on their way, from its start


class Entry(NamedTuple):
    """A file on the device. stamp: what changes with any change of it (inode, mode, times)."""

    size: int
    stamp: str


class Survey(NamedTuple):
    """What one look at the device says.

    facts: NAME -> value. free: bytes. files: the wanted files that are there. odd: path ->
    "link" or "folder" where a file or a real folder should be. parts: sha256 -> bytes that are
    there. manifest: its text, or None. present: which of our marks are there.
    """

    facts: Mapping[str, str]
    free: int
    files: Mapping[str, Entry]
    odd: Mapping[str, str]
    parts: Mapping[str, int]
    manifest: str | None
    present: frozenset[str]


class RemoteFolder:
    """The folder `root` of a device; every path is relative to it and already checked."""

    def __init__(self, transport: Transport, root: str) -> None:
        self.transport = transport
        self.root = root

    def enter(self, script: str) -> str:
        return f"umask 022; export TZ=UTC0 LC_ALL=C\ncd -- {quoted(self.root)} || exit 1\n{script}"

    def call(self, script: str, lines: Iterable[str] = (), *, size: int = 0, what: str = "") -> str:
        """Run a script in the folder with `lines` as its input. size: bytes that it reads."""
        data = "".join(f"{line}\n" for line in lines).encode()
        limit = QUICK + size / SLOWEST
        script = self.enter(script)
        return call(self.transport, script, data, timeout=limit, what=what).decode(errors="replace")

    def survey(self, paths: Sequence[str]) -> Survey:
        """One round trip that reads everything a deploy has to know, and writes nothing."""
        folders = sorted({parent for path in paths for parent in parents(path)})
        asked = [*(f"{folder}/" for folder in folders), *paths]
        script = SURVEY.format(
            root=quoted(self.root), facts=self.transport.facts_script(), stat=quoted(STAT), own=OWN
        )
        data = "".join(f"{line}\n" for line in asked).encode()
        said = call(self.transport, script, data, what="look at the device")
        return parse_survey(said.decode(errors="replace"))

    def send(self, source: str, sha256: str, sent: Sent, stop: threading.Event) -> str:
        """Append to the part what it lacks of the file `source`; its sha256 as the device has it.

        Waits for an earlier sender of a killed qbuild to end; then the size is what it is.
        """
        part = f"{OWN}/{sha256}.part"
        started = Started(self.transport, self.enter(SEND.format(part=part, own=OWN)))
        progress = Watch(started.process.kill)
        try:
            offset = self._offset(started)
            with Path(source).open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                pump(
                    file.fileno(),
                    started.stdin.fileno(),
                    offset,
                    total,
                    progress.seeing(sent),
                    stop,
                )
            progress.expect(total / SLOWEST)
            started.close_input()
            digest, code = started.end(started.stdout.read())
        finally:
            progress.end()
            started.close()
        if code:
            said = started.error_text()
            message = f"{self.transport.name}: cannot write {self.root}/{part}: {said}"
            raise CommandFailed(message, code, said, remedy=room_for(said))
        return digest.decode(errors="replace").partition(" ")[0]

    def _offset(self, started: Started) -> int:
        line = started.stdout.readline()
        word, _, size = line.decode(errors="replace").strip().partition(" ")
        if word != "offset":
            _, code = started.end(line + started.stdout.read())
            said = started.error_text()
            raise CommandFailed(f"{self.transport.name}: cannot send: {said}", code, said)
        return int(size)

    def digests(self, paths: Sequence[str], size: int) -> dict[str, str]:
        """Path -> sha256 as the device computes it, of those that are there. size: bytes in all."""
        said = self.call(DIGEST, paths, size=size, what="compute digests")
        found = {}
        for line in said.splitlines():
            digest, _, path = line.partition("  ./")
            found[path] = digest
        return found

    def place(self, lines: Sequence[str], stale: Sequence[str], size: int) -> dict[str, Entry]:
        """Rename parts to their final names, all of them on the disk before the first.

        lines: "MODE SHA256 PATH". stale: caches that must be gone before anything new is seen.
        Returns the new entries.
        """
        gone = " ".join(quoted(f"./{path}") for path in [*stale, f"{OWN}/none"])
        changed = [*(line.split(" ", 2)[2] for line in lines), *stale]
        above = sorted({"", *(folder for path in changed for folder in parents(path))})
        folders = " ".join(quoted(f"./{folder}") for folder in above)
        script = PLACE.format(own=OWN, gone=gone, folders=folders, stat=quoted(STAT))
        said = self.call(script, lines, size=size, what="put the files in place")
        return dict(parse_stat(line) for line in said.splitlines() if "|" in line)

    def write_manifest(self, text: str) -> None:
        """The last step: from here on the device holds what the manifest says."""
        self.call(MANIFEST.format(own=OWN), [text], what="write the manifest")

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files (never folders that hold anything)."""
        self.call(REMOVE, paths, what="remove files")


class Watch:
    """Ends a client that moves nothing for a long time. Invariant: `end` stops its thread."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self._at = 0
        self._more = 0.0
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def seeing(self, sent: Sent) -> Sent:
        def seen(offset: int) -> None:
            self._at = offset
            sent(offset)

        return seen

    def expect(self, seconds: float) -> None:
        """From now on nothing moves for this long, and that is as it should be."""
        self._more = seconds
        self._at += 1

    def end(self) -> None:
        self._over.set()

    def _look(self) -> None:
        before = -1
        while not self._over.wait(STALLED + self._more):
            if self._at == before:
                self._kill()
                return
            before = self._at


def parents(path: str) -> list[str]:
    """The folders above a relative path: "a/b/c" -> ["a", "a/b"]."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def room_for(said: str) -> str | None:
    if "No space left" in said:
        return "make room on the device and run it again: what is sent is kept"
    return None


def pump(
    source: int, pipe: int, offset: int, total: int, sent: Sent, stop: threading.Event
) -> None:
    """Move a file from `offset` on into a pipe without reading it here.

    Returns early where the reader is gone: what became of the script says why.
    """
    while offset < total and not stop.is_set():
        try:
            count = os.splice(source, pipe, min(CHUNK, total - offset), offset_src=offset)
        except BrokenPipeError:
            return
        if count == 0:
            raise DeviceError("the file became shorter while it was sent", remedy="run it again")
        offset += count
        sent(offset)


def parse_stat(line: str) -> tuple[str, Entry]:
    size, stamp, path = line.split("|", 1)[0], line, line.rsplit("|", 1)[1]
    return path.removeprefix("./"), Entry(int(size), stamp.rsplit("|", 1)[0])


def parse_survey(text: str) -> Survey:
    """What SURVEY printed."""
    head, _, manifest = text.partition("\nmanifest\n")
    facts: dict[str, str] = {}
    files: dict[str, Entry] = {}
    odd: dict[str, str] = {}
    parts: dict[str, int] = {}
    present: set[str] = set()
    for line in head.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "stat":
            path, entry = parse_stat(rest)
            files[path] = entry
        elif kind in ("link", "folder"):
            odd[rest] = kind
        elif kind == "part":
            path, entry = parse_stat(rest)
            parts[path.removeprefix(f"{OWN}/").removesuffix(".part")] = entry.size
        elif kind == "there":
            present.add(rest)
        elif kind:
            facts.setdefault(kind, rest.strip())
    blocks, _, size = facts.pop("free", "").partition(" ")
    free = int(blocks) * int(size) if blocks and size else 0
    return Survey(facts, free, files, odd, parts, manifest or None, frozenset(present))


# `%n` is last in STAT: names are checked to hold no "|". One `stat` serves all files.
SURVEY = """export TZ=UTC0 LC_ALL=C
echo machine "$(uname -m)"
for each in sha256sum flock setsid stat; do
    command -v $each >/dev/null 2>&1 && echo has-$each yes
done
(
:
{facts}
) </dev/null
at={root}
while [ ! -d "$at" ]; do at=$(dirname -- "$at"); done
echo free $(stat -f -c "%a %S" -- "$at")
[ -w "$at" ] && echo writable yes
cd -- {root} 2>/dev/null || exit 0
set --
while read -r path; do
    case $path in
    */) [ -L "./${{path%/}}" ] && echo "link ${{path%/}}" ;;
    *)  if [ -L "./$path" ]; then echo "link $path"
        elif [ -d "./$path" ]; then echo "folder $path"
        elif [ -e "./$path" ]; then set -- "$@" "./$path"; fi ;;
    esac
done
[ $# -gt 0 ] && stat -c "stat "{stat} -- "$@"
set -- {own}/*.part
[ -e "$1" ] && stat -c "part "{stat} -- "$@"
for each in {own}/running {own}/placing; do [ -e $each ] && echo "there $each"; done
printf '\\nmanifest\\n'
[ -f {own}/manifest.json ] && cat {own}/manifest.json
true"""

# The second lock: two senders never write to one part, not even when one's qbuild is dead.
# `8>&8`: mksh hides its own descriptors from what it starts.
SEND = """exec 8>>{own}/sending || exit 1
if command -v flock >/dev/null 2>&1; then flock 8 8>&8 || exit 1; fi
[ -e {part} ] || : > {part} || exit 1
echo offset $(stat -c %s -- {part})
cat 8>&8 >> {part} && sha256sum -- {part}"""

DIGEST = """set --
while read -r path; do [ -f "./$path" ] && set -- "$@" "./$path"; done
[ $# -eq 0 ] || sha256sum -- "$@" """

# toybox and busybox have fsync, coreutils' sync takes names; one of them is everywhere.
HARDEN = """harden() {
    if command -v fsync >/dev/null 2>&1; then fsync "$@"
    else sync "$@" 2>/dev/null || sync; fi
}
"""

PLACE = (
    HARDEN.replace("{", "{{").replace("}", "}}")
    + """lines=$(cat)
mkdir -p -- {folders} || exit 1
# One content under two names: a part is moved once, so the others get copies of it.
printf '%s\\n' "$lines" | while read -r mode part path; do
    [ -e {own}/$part.part ] || cp {own}/${{part%%-*}}.part {own}/$part.part || exit 1
    chmod "$mode" {own}/$part.part && harden {own}/$part.part || exit 1
done || exit 1
: > {own}/placing && rm -f -- {gone} && harden {own} {folders} || exit 1
printf '%s\\n' "$lines" | while read -r mode part path; do
    mv -f -- {own}/$part.part "./$path" || exit 1
done || exit 1
harden {folders} || exit 1
printf '%s\\n' "$lines" | while read -r mode part path; do
    stat -c {stat} -- "./$path" || exit 1
done"""
)

MANIFEST = (
    HARDEN.replace("{", "{{").replace("}", "}}")
    + """cat > {own}/manifest.new && harden {own}/manifest.new || exit 1
mv -f {own}/manifest.new {own}/manifest.json && harden {own} && rm -f {own}/placing"""
)

REMOVE = """while read -r path; do rm -f -- "./$path" || exit 1; done"""
