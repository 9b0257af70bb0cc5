"""`qbuild all`: build every artifact of the recipe that is stale."""

from __future__ import annotations

import argparse

from buildsys.cli import build_steps


def configure(parser: argparse.ArgumentParser) -> None:
    build_steps.configure(parser, targets=False)


def run(args: argparse.Namespace) -> int:
    return build_steps.run(args)
