"""Words and events for steps and processes that ended before they could tell of it."""

from __future__ import annotations

import signal

from buildsys.engine.executor import Ended


def refused(name: str, error: str) -> Ended:
    """The end of an order that never ran, or of which nothing more is known."""
    return Ended(name, 1, 0, False, False, error, "", {}, (), 0.0, 0.0, 0, 0)


def how_it_ended(code: int) -> str:
    """Of an exit status, or of a signal below 0."""
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def many_threads(count: int) -> str:
    return (
        f"the warm worker has {count} threads after its imports and cannot fork safely; "
        "this step imports everything anew"
    )
