"""Dask tells its troubles to loggers, with tracebacks; a person gets them in our words."""

from __future__ import annotations

import logging

TALKATIVE = ("distributed", "tornado", "asyncio")


def hush() -> None:
    """Silence the loggers that there are by now: some have levels and handlers of their own."""
    for name in (*TALKATIVE, *logging.root.manager.loggerDict):
        if name.partition(".")[0] in TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
