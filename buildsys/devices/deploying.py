"""One device, from its description to a program that has run: a list of stages."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from buildsys.devices.definitions import Device, Run, transport_of
from buildsys.devices.device_lock import DeviceLock
from buildsys.devices.errors import TIMED_OUT, DeviceError
from buildsys.devices.host_files import HostFile
from buildsys.devices.names import checked_path, checked_root
from buildsys.devices.npu import check_npus
from buildsys.devices.payload import PushFile
from buildsys.devices.preflight import check_device, facts_of
from buildsys.devices.progress import Report, amount
from buildsys.devices.protocol import Decision, Options, check_space, decide, transfer
from buildsys.devices.pulling import pull
from buildsys.devices.remote_folder import RemoteFolder, Survey
from buildsys.devices.running import SCRIPT, Ended, run_on, run_script
from buildsys.devices.transport import guarded
from buildsys.plan.globs import is_glob, matching

INTERRUPTED = 130
UNEXPECTED = 1


class Task(NamedTuple):
    """What a command line asks of each device. adb: the program it names. results: the folder
    here that `pull` writes into, by device."""

    options: Options
    dry_run: bool
    run: bool
    arguments: tuple[str, ...]
    adb: str | None
    results: str


def deploy(
    device: Device, files: Sequence[PushFile], task: Task, report: Report, stop: threading.Event
) -> int:
    """Check, send, place and perhaps run; the exit code. Raises QbuildError."""
    root = checked_root(device.root, device.transport)
    keys = cache_keys(device, files)
    transport = transport_of(device, task.adb)
    try:
        transport.connect()
        folder = RemoteFolder(transport, root)
        if task.dry_run:
            look(folder, device, files, keys, task, report)
            return 0
        with DeviceLock(folder, lambda text: report.event("waiting", text)):
            with scripted(folder, device, files, keys) as (survey, everything):
                put(folder, device, everything, keys, survey, task, report, stop)
            return run_and_pull(folder, device, task, report, stop) if task.run else 0
    finally:
        guarded(transport.close)


def cache_keys(device: Device, files: Sequence[PushFile]) -> dict[str, tuple[str, list[str]]]:
    """Cache file -> (its key, the targets that it depends on)."""
    keys = {}
    for cache, wanted in device.invalidates.items():
        path = checked_path(cache)
        mine = [file for file in files if any(_means(file, what) for what in wanted)]
        hasher = hashlib.sha256()
        for file in sorted(mine):
            hasher.update(f"{file.target} {file.facts.sha256}\n".encode())
        keys[path] = (hasher.hexdigest(), [file.target for file in mine])
    return keys


def _means(file: PushFile, what: str) -> bool:
    """Is this file of the artifact, or at the target, that `invalidates` names?"""
    names = (file.artifact, file.artifact.rstrip("/"), file.target)
    return what in names or (is_glob(what) and bool(matching(what, names)))


@contextlib.contextmanager
def scripted(
    folder: RemoteFolder,
    device: Device,
    files: Sequence[PushFile],
    keys: Mapping[str, tuple[str, list[str]]],
) -> Iterator[tuple[Survey, list[PushFile]]]:
    """The survey of the device, and the files with the run script among them."""
    targets = [file.target for file in files]
    survey = folder.survey([*targets, *([SCRIPT] if device.run else [])])
    if device.run is None:
        yield survey, list(files)
        return
    text = run_script(
        device.run,
        {path: key for path, (key, _) in keys.items()},
        folder.root,
        facts_of(survey).all,
    )
    with written_here(text) as path:
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts = HostFile(digest, len(text.encode()), "", True, "")
        yield survey, [*files, PushFile(SCRIPT, str(path), 0o755, "", facts)]


@contextlib.contextmanager
def written_here(text: str) -> Iterator[Path]:
    """A file that holds the text, while this lasts. Raises DeviceError where there is no room."""
    with contextlib.ExitStack() as stack:
        try:
            here = stack.enter_context(tempfile.TemporaryDirectory(prefix="qbuild-run-"))
            path = Path(here, "run.sh")
            path.write_text(text)
        except OSError as error:
            raise DeviceError(
                f"the run script cannot be written on this machine: {error.strerror}",
                remedy="make room in the folder for temporary files, or give another: TMPDIR",
            ) from error
        yield path


def put(
    folder: RemoteFolder,
    device: Device,
    files: Sequence[PushFile],
    keys: Mapping[str, tuple[str, list[str]]],
    survey: Survey,
    task: Task,
    report: Report,
    stop: threading.Event,
) -> Decision:
    """Bring the files there and say what was done."""
    check_device(device, files, survey)
    check_npus(folder.transport, files, report)
    caches = {path: targets for path, (_, targets) in keys.items()}
    decision = decide(folder, files, caches, survey, task.options.verify)
    check_space(decision, survey, task.options.replace_in_place)
    transfer(folder, files, decision, survey, task.options, report, stop)
    for path in decision.stale:
        report.event("invalidated", f"{path} is stale and was removed", file=path)
    sent = len(decision.place)
    text = (
        f"{len(files)} files are there and complete: "
        + (f"{sent} sent ({amount(decision.bytes)})" if sent else "nothing had to be sent")
        + (", all compared by digest" if task.options.verify else "")
    )
    report.event("deployed", text, files=len(files), sent=sent, bytes=decision.bytes)
    return decision


def look(
    folder: RemoteFolder,
    device: Device,
    files: Sequence[PushFile],
    keys: Mapping[str, tuple[str, list[str]]],
    task: Task,
    report: Report,
) -> None:
    """Every check and no write: what a deploy would do."""
    with scripted(folder, device, files, keys) as (survey, everything):
        check_device(device, everything, survey)
        check_npus(folder.transport, everything, report)
        caches = {path: targets for path, (_, targets) in keys.items()}
        decision = decide(folder, everything, caches, survey, task.options.verify)
        check_space(decision, survey, task.options.replace_in_place)
    for file in decision.place:
        size = file.facts.size
        report.event(
            "would-send", f"would send {file.target} ({amount(size)})", file=file.target, size=size
        )
    for path in decision.stale:
        report.event("would-remove", f"would remove {path}, which would be stale", file=path)
    if task.options.prune:
        for path in decision.orphans:
            report.event("would-remove", f"would remove {path}", file=path)
    if not decision.place:
        report.event("would-send", "nothing would be sent")


def run_and_pull(
    folder: RemoteFolder, device: Device, task: Task, report: Report, stop: threading.Event
) -> int:
    """Run what the device's `run` says; its own exit code, 124 when its time was up, 1 when it
    did not print what it should."""
    run = device.run
    if run is None:
        raise DeviceError(f"the device '{device.name}' has nothing to run", remedy="add `run:`")
    report.event("running", "", argv=[*run.argv, *task.arguments])
    ended = run_on(folder, run, task.arguments, report, stop)
    code = judged(ended, run, report)
    report.event("ended", code=ended.code, exit=code)
    if code == 0 and device.pull:
        into = Path(task.results, device.name)
        for there, here in device.pull.items():
            path = pull(folder, checked_path(there), into, checked_path(here))
            report.event("pulled", f"{there} -> {path}", file=there, path=str(path))
    return code


def judged(ended: Ended, run: Run, report: Report) -> int:
    """The exit code of a run that came to its end."""
    if ended.cause == "stop":
        return INTERRUPTED
    if ended.cause == "timeout":
        report.event("timeout", f"it ran longer than {run.timeout:g} s and was ended")
        return TIMED_OUT
    if ended.code != run.exit:
        report.event("failed", f"it ended with {ended.code}, not {run.exit}")
        return ended.code or UNEXPECTED
    if not ended.seen:
        report.event("failed", f"it did not print {run.output!r}")
        return UNEXPECTED
    return 0
