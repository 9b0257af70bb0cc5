"""`qbuild worker dask://HOST:PORT`: run steps for builds on other machines."""

from __future__ import annotations

import argparse
import os
import signal

from buildsys.cli.build_words import say
from buildsys.cli.up_to_date import amount, positive
from buildsys.errors import QbuildError, UsageError

SIGNALLED = 128


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("executor", metavar="dask://HOST:PORT", help="the scheduler to work for")
    parser.add_argument(
        "--cpus", type=positive, metavar="N", help="threads of steps (default: processors)"
    )
    parser.add_argument(
        "--memory", type=amount, metavar="SIZE", help="for all steps (default: what is free)"
    )
    parser.add_argument("--gpus", type=whole, metavar="N", help="default: those that are here")
    parser.add_argument(
        "--licence",
        action="append",
        default=[],
        type=licence,
        metavar="NAME=N",
        help="steps that may hold it here at a time",
    )
    parser.add_argument(
        "--toolchains", metavar="DIR", help="more definitions of toolchains (default: ./toolchains)"
    )


def whole(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"'{word}' is not a number")
    return int(word)


def licence(word: str) -> tuple[str, int]:
    name, equals, count = word.partition("=")
    if not name or (equals and not (count.isdecimal() and int(count) > 0)):
        raise argparse.ArgumentTypeError(f"'{word}' is not NAME or NAME=N")
    return name, int(count or 1)


def run(args: argparse.Namespace) -> int:
    """Work until interrupted (128 + the signal), or until the scheduler is gone (1)."""
    from buildsys.engine.dask.address import parse
    from buildsys.engine.schedule import machine_capacity
    from buildsys.gpus import gpu_count
    from buildsys.toolchains.definitions import folders_for

    address = parse(args.executor)
    if not address.scheduler:
        raise UsageError("dask://local starts its own workers", remedy="name a scheduler")
    from buildsys.engine.dask.worker import Settings, work

    gpus = gpu_count() if args.gpus is None else args.gpus
    capacity = machine_capacity(args.cpus, gpus, args.memory)
    if args.cpus is not None:
        capacity = capacity._replace(threads=args.cpus)
    own = folders_for(os.path.join("recipes", "recipe.yaml"))
    folders = own if args.toolchains is None else (os.path.abspath(args.toolchains), *own)
    settings = Settings(address.scheduler, capacity, dict(args.licence), folders)
    ended = work(settings, say)
    if ended == 0:
        raise QbuildError(f"the scheduler at {address.scheduler} is gone; so is this worker")
    say(f"stopped by {signal.Signals(ended).name}")
    return SIGNALLED + ended
