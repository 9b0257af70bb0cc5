"""A worker process of `dask://local`: as `qbuild worker`, with its settings as JSON."""

from __future__ import annotations

import json

from buildsys.engine.dask.worker import Settings, work
from buildsys.engine.schedule import Capacity


def main(arguments: list[str]) -> None:
    """arguments: [scheduler, capacity, licences, folders of toolchains]."""
    scheduler, capacity, licences, toolchains = json.loads(arguments[0])
    work(Settings(scheduler, Capacity(*capacity), licences, tuple(toolchains)), print)
