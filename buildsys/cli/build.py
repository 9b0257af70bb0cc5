"""`qbuild build`: build the named artifacts and what they need."""

from __future__ import annotations

import argparse

from buildsys.cli import up_to_date


def configure(parser: argparse.ArgumentParser) -> None:
    up_to_date.configure(parser, targets=True)


def run(args: argparse.Namespace) -> int:
    return up_to_date.run(args)
