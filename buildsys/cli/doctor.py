"""`qbuild doctor`: which toolchains are here, what they unlock, and how to get the others."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.errors import ToolchainMissing, UsageError

if TYPE_CHECKING:
    from buildsys.toolchains.survey import Finding

WIDTH = 80
INDENT = " " * 9


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="TOOLCHAIN", help="only these; 3 if one is missing"
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    """0; with names given, 3 where one of them is missing."""
    findings = findings_of(args.words)
    if args.json:
        print(json.dumps([each._asdict() for each in findings], indent=1))
    else:
        for each in findings:
            print("\n".join(paragraph(each)))
    missing = [each.name for each in findings if not each.found]
    return ToolchainMissing.exit_code if args.words and missing else 0


def findings_of(names: list[str]) -> list[Finding]:
    """Raises UsageError for a name that nothing is known of."""
    from buildsys.toolchains.definitions import folders_for, known_names
    from buildsys.toolchains.survey import survey

    # As seen from a recipe in ./recipes: the project's own toolchains/, then qbuild's.
    folders = folders_for(os.path.join("recipes", "recipe.yaml"))
    known = known_names(folders)
    for name in names:
        if name not in known:
            remedy = f"Known: {', '.join(known)}."
            raise UsageError(f"there is no toolchain '{name}'", remedy=remedy)
    return survey(folders, os.environ, names)


def paragraph(finding: Finding) -> Iterator[str]:
    """What to say of one toolchain, in lines of at most 80 columns (paths and pages may be
    longer: they are for copying)."""
    state = "found" if finding.found else "missing"
    yield f"{state:8} {finding.name}  {finding.version}".rstrip()
    yield from wrapped(finding.doc)
    if finding.path:
        yield f"{INDENT}{finding.path}"
    if finding.unlocks:
        yield from wrapped(f"unlocks {', '.join(finding.unlocks)}")
    if not finding.found:
        yield from wrapped(finding.why)
        yield from mending(finding)


def mending(finding: Finding) -> Iterator[str]:
    """The one command or page that mends it, on a line of its own."""
    if finding.install:
        yield f"{INDENT}-> qbuild toolchain install {finding.name}"
        return
    if finding.get:
        yield from wrapped(f"-> {finding.get}", f"{INDENT}   ")
    if finding.page:
        yield f"{INDENT}   {finding.page}"


def wrapped(text: str, further: str = INDENT) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=INDENT,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
