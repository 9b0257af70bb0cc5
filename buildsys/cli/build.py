"""`qbuild build`: build the named artifacts and what they need."""

from __future__ import annotations

import argparse

from buildsys.cli import build_steps


def configure(parser: argparse.ArgumentParser) -> None:
    build_steps.configure(parser, targets=True)


def run(args: argparse.Namespace) -> int:
    return build_steps.run(args)
