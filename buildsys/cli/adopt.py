"""`qbuild adopt`: take an artifact that was made elsewhere, with the digests of its inputs."""

from __future__ import annotations

import argparse

from buildsys.cli.build_words import add_folder_words, project_of, say
from buildsys.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=True)
    parser.epilog = (
        "qbuild adopt [RECIPE] TARGET FILE [OUTPUT=FILE ...]: FILE becomes TARGET, and each "
        "further output of its step takes the file that is given for it."
    )


def run(args: argparse.Namespace) -> int:
    from buildsys.engine.adopting import adopt
    from buildsys.plan.targets import steps_of

    project, words = project_of(args)
    if len(words) < 2:
        raise UsageError(
            "adopt needs a target and a file", remedy="qbuild adopt TARGET FILE [OUTPUT=FILE ...]"
        )
    steps = steps_of(project.plan, words[0])
    if len(steps) != 1:
        raise UsageError(f"'{words[0]}' means {len(steps)} artifacts; adopt takes one at a time")
    record = adopt(project, steps[0], read_files(words[1:]), say)
    print(f"adopted {steps[0]}, as made from:")
    for items in record["inputs"].values():
        for label, digest in items:
            print(f"  {label} {str(digest)[:16]}")
    return 0


def read_files(words: tuple[str, ...]) -> dict[str, str]:
    """Output name -> file. The first word without "=" is the main output's.

    >>> read_files(("a.mxq", "rotation=r.pth"))
    {'out': 'a.mxq', 'rotation': 'r.pth'}
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        name, path = (name, path) if equals else ("out", word)
        if name in found:
            raise UsageError(f"two files are given for the output '{name}'")
        found[name] = path
    return found
