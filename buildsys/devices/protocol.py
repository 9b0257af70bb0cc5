"""Puts files on a device so that nothing half-written is ever seen under a final name.

In this order: look, decide, make room, send parts, compare digests there, harden, take away the
caches that the new files make stale, rename everything, write the manifest. Whatever is cut,
whenever: the old files are whole, or the new ones are; the next run goes on from the parts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from buildsys.devices.errors import DeviceError, DeviceRefused
from buildsys.devices.manifest import Manifest, Placed, believed, read_manifest, write_manifest
from buildsys.devices.payload import PushFile
from buildsys.devices.progress import Report, amount
from buildsys.devices.remote_folder import OWN, Entry, RemoteFolder, Survey

# What the manifest, folders and the file system's own book-keeping may take.
MARGIN = 1 << 20
ATTEMPTS = 2


class Options(NamedTuple):
    """verify: compute every digest on the device. prune: remove what was deployed earlier and
    no longer is. replace_in_place: remove old files before their successors are sent."""

    verify: bool = False
    prune: bool = False
    replace_in_place: bool = False


class Decision(NamedTuple):
    """What a deploy will do. send: by sha256, one file each. place: files to be renamed into
    place. kept: files that are there, with their manifest entries. stale: caches to remove.
    orphans: paths that an earlier deploy placed and this one does not know. bytes: to be sent."""

    send: Mapping[str, PushFile]
    place: Sequence[PushFile]
    kept: Mapping[str, Placed]
    stale: Sequence[str]
    orphans: Sequence[str]
    bytes: int


class Stopped(DeviceError):
    """The person, or another device's failure, asked for an end."""


def decide(
    folder: RemoteFolder,
    files: Sequence[PushFile],
    caches: Mapping[str, Collection[str]],
    survey: Survey,
    verify: bool,
) -> Decision:
    """Compare what is there with what is wanted.

    A file whose stamp is not the manifest's, and all files where `verify` is set, are judged by
    the digest that the device computes. caches: cache file -> the targets that make it stale.
    """
    manifest = read_manifest(survey.manifest)
    doubtful = [
        file
        for file in files
        if file.target in survey.files
        and survey.files[file.target].size == file.facts.size
        and (verify or not believed(manifest.files.get(file.target), survey.files[file.target]))
    ]
    digests = there(folder, doubtful)
    kept, place = {}, []
    for file in files:
        entry, placed = survey.files.get(file.target), manifest.files.get(file.target)
        if file in doubtful:
            digest = digests.get(file.target)
        else:
            digest = placed.sha256 if placed is not None and believed(placed, entry) else None
        if entry is not None and digest == file.facts.sha256:
            kept[file.target] = Placed(digest, entry.size, entry.stamp)
        else:
            place.append(file)
    send = {file.facts.sha256: file for file in place}
    changed = {file.target for file in place}
    wanted = {file.target for file in files}
    missing = sum(left(file, survey) for file in send.values())
    return Decision(
        send=send,
        place=place,
        kept=kept,
        stale=[cache for cache, keys in caches.items() if changed & set(keys)],
        orphans=sorted(set(manifest.files) - wanted),
        bytes=missing,
    )


def left(file: PushFile, survey: Survey) -> int:
    """How many bytes of a file the device lacks."""
    have = survey.parts.get(file.facts.sha256, 0)
    return file.facts.size - have if have <= file.facts.size else file.facts.size


def there(folder: RemoteFolder, files: Sequence[PushFile]) -> dict[str, str]:
    if not files:
        return {}
    return folder.digests([file.target for file in files], sum(f.facts.size for f in files))


def check_space(decision: Decision, survey: Survey, in_place: bool) -> None:
    """Raises DeviceRefused where old and new do not fit side by side."""
    copies = sum(file.facts.size for file in decision.place) - sum(
        file.facts.size for file in decision.send.values()
    )
    freed = 0
    if in_place:
        old = (survey.files.get(file.target) for file in decision.place)
        freed = sum(entry.size for entry in old if entry is not None)
    need = decision.bytes + copies + MARGIN - freed
    if decision.place and need > survey.free:
        remedy = "make room there"
        if not in_place:
            remedy += ", or let the old files go first with --replace-in-place"
        raise DeviceRefused(
            f"{amount(need)} are needed and {amount(survey.free)} are free on the device",
            remedy=remedy,
        )


def transfer(
    folder: RemoteFolder,
    files: Sequence[PushFile],
    decision: Decision,
    survey: Survey,
    options: Options,
    report: Report,
    stop: threading.Event,
) -> Manifest:
    """Carry a decision out; the device then holds exactly what the manifest returned says."""
    manifest = read_manifest(survey.manifest)
    known = {path: placed for path, placed in manifest.files.items() if path in decision.orphans}
    if decision.place:
        if options.replace_in_place:
            give_way(folder, decision, known)
        meter = Meter(report, decision.bytes)
        for file in decision.send.values():
            send(folder, file, survey, meter, stop)
        entries = place(folder, decision)
        known |= {
            file.target: Placed(file.facts.sha256, *entries[file.target]) for file in decision.place
        }
    new = Manifest({**known, **decision.kept})
    if new.files != manifest.files or f"{OWN}/placing" in survey.present:
        folder.write_manifest(write_manifest(new))
    if options.prune:
        new = prune(folder, decision, survey, new, report)
    return new


def give_way(folder: RemoteFolder, decision: Decision, orphans: Mapping[str, Placed]) -> None:
    """Remove what will be replaced, and first of all forget it."""
    folder.write_manifest(write_manifest(Manifest({**orphans, **decision.kept})))
    folder.remove([*decision.stale, *(file.target for file in decision.place)])


def send(
    folder: RemoteFolder, file: PushFile, survey: Survey, meter: Meter, stop: threading.Event
) -> None:
    """Send what is missing of one file and compare its digest there. Raises DeviceError."""
    sha256, size = file.facts.sha256, file.facts.size
    part = f"{OWN}/{sha256}.part"
    if survey.parts.get(sha256, 0) > size:
        folder.remove([part])
    have = survey.parts.get(sha256, 0)
    for _ in range(ATTEMPTS):
        meter.begin(file, have)
        found = folder.send(file.path, sha256, meter.at, stop)
        if stop.is_set():
            raise Stopped(f"{folder.transport.name}: stopped; what is sent is kept")
        if found == sha256:
            meter.done(file)
            return
        meter.report.event("mismatch", f"{file.target}: arrived changed; sent again", file=part)
        folder.remove([part])
        have = 0
    raise DeviceError(
        f"{folder.transport.name}: {file.target} arrives changed, {ATTEMPTS} times in a row",
        remedy="the file changed while it was sent, or the cable or the device's disk fails",
    )


def place(folder: RemoteFolder, decision: Decision) -> dict[str, Entry]:
    """Rename everything. Of one content under several names, all but the first get copies."""
    lines, used = [], dict.fromkeys(decision.send, 0)
    for file in decision.place:
        sha256 = file.facts.sha256
        part = f"{sha256}-{used[sha256]}" if used[sha256] else sha256
        used[sha256] += 1
        lines.append(f"{file.mode:o} {part} {file.target}")
    # Copies are made before the first rename takes their original away.
    size = sum(file.facts.size for file in decision.place)
    entries = folder.place(lines, decision.stale, size)
    missing = [file.target for file in decision.place if file.target not in entries]
    if missing:
        raise DeviceError(f"{folder.transport.name}: {missing[0]} is not there after its rename")
    return entries


def prune(
    folder: RemoteFolder, decision: Decision, survey: Survey, manifest: Manifest, report: Report
) -> Manifest:
    """Remove what earlier deploys placed and this one does not want, and parts left over.

    Files that qbuild did not place, or that were changed since, are not touched.
    """
    entries = folder.survey(decision.orphans).files if decision.orphans else {}
    mine = [path for path in decision.orphans if believed(manifest.files[path], entries.get(path))]
    for path in sorted(set(decision.orphans) - set(mine)):
        if path in entries:
            report.event("kept", f"{path} was changed on the device and is kept", file=path)
    parts = [f"{OWN}/{sha256}.part" for sha256 in survey.parts if sha256 not in decision.send]
    if not mine and not parts and not decision.orphans:
        return manifest
    folder.remove([*mine, *parts])
    for path in mine:
        report.event("removed", f"removed {path}", file=path)
    gone = set(decision.orphans)
    new = Manifest({path: each for path, each in manifest.files.items() if path not in gone})
    folder.write_manifest(write_manifest(new))
    return new


class Meter:
    """Bytes of all files, counted as they leave."""

    def __init__(self, report: Report, total: int) -> None:
        self.report = report
        self.total = total
        self.before = 0  # bytes of the files before this one that had to be sent
        self.sent = 0
        self._file, self._size = "", 0
        self._offset: int | None = None
        self._began = time.monotonic()

    def begin(self, file: PushFile, have: int) -> None:
        self.before = self.sent
        self._file, self._size = file.target, file.facts.size
        self._offset = have if have <= file.facts.size else 0
        facts = {"file": file.target, "size": file.facts.size, "from": self._offset}
        going_on = f", from {amount(self._offset)} on" if self._offset else ""
        text = f"sending {file.target} ({amount(file.facts.size)}{going_on})"
        self.report.event("sending", text, **facts)

    def at(self, offset: int) -> None:
        """`offset` bytes of the present file are on their way."""
        if self._offset is None:
            self._offset = 0
        self.sent = self.before + offset - self._offset
        if offset == self._size:
            self.report.event("verifying", file=self._file)
        seconds = max(time.monotonic() - self._began, 1e-6)
        self.report.progress(self._file, self.sent, self.total, self.sent / seconds)

    def done(self, file: PushFile) -> None:
        sent = self.sent - self.before
        self.report.event("sent", file=file.target, sent=sent, sha256=file.facts.sha256)
