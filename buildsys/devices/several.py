"""Several devices at once: a thread for each, prefixed lines, and the worst exit code."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence

from buildsys.devices.definitions import Device
from buildsys.devices.progress import Report
from buildsys.errors import QbuildError, is_for_people

Work = Callable[[Device, Report, threading.Event], int]
BUG = 70
INTERRUPTED = 130


def on_each(devices: Sequence[Device], work: Work, *, as_json: bool) -> int:
    """Do the work on every device; one that fails stops no other.

    Ctrl-C asks all of them to stop and waits: programs that run are ended there.
    """
    stop = threading.Event()
    width = max(len(device.name) for device in devices)
    codes: dict[str, int] = {}

    def one(device: Device) -> None:
        prefix = f"{device.name:{width}}  " if len(devices) > 1 else ""
        report = Report(device.name, prefix=prefix, as_json=as_json)
        codes[device.name] = attempt(device, work, report, stop)

    threads = [threading.Thread(target=one, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stop.set()
        for thread in threads:
            thread.join()
        return INTERRUPTED
    return max(codes.values(), key=severity)


def attempt(device: Device, work: Work, report: Report, stop: threading.Event) -> int:
    """The work on one device, its errors told."""
    try:
        return work(device, report, stop)
    except QbuildError as error:
        report.event("error", str(error), message=error.message, remedy=error.remedy)
        return INTERRUPTED if stop.is_set() else error.exit_code
    except Exception as error:  # the edge of a thread: a bug must show, and fail the command
        if is_for_people(error):
            report.event("error", f"error: {error}", message=str(error))
            return 1
        report.event("error", traceback.format_exc(), message=repr(error))
        return BUG


def severity(code: int) -> tuple[bool, bool, int]:
    """Nothing is worse than a bug; any failure is worse than none."""
    return code == BUG, code != 0, code
