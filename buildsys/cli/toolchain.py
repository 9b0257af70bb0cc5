"""`qbuild toolchain`: list them, show one, install those that public registries have."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from buildsys.cli.doctor import findings_of, paragraph


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (summary, _) in WHATS.items():
        sub = verbs.add_parser(name, help=summary, description=summary)
        if name != "list":
            sub.add_argument("name", metavar="NAME")
        if name != "install":
            sub.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    return WHATS[args.what][1](args)


def show_list(args: argparse.Namespace) -> int:
    """One line for each toolchain."""
    findings = findings_of([])
    if args.json:
        print(json.dumps([each._asdict() for each in findings], indent=1))
        return 0
    width = max((len(each.name) for each in findings), default=0)
    for each in findings:
        state = "found" if each.found else "missing"
        note = each.version if each.found else f"qbuild toolchain install {each.name}"
        told = note if each.found or each.install else "qbuild doctor says where to get it"
        print(f"{state:8} {each.name:{width}}  {told}".rstrip())
    return 0


def show(args: argparse.Namespace) -> int:
    """All that is known of one; 3 where it is missing."""
    (finding,) = findings_of([args.name])
    if args.json:
        print(json.dumps(finding._asdict(), indent=1))
    else:
        print("\n".join(paragraph(finding)))
    return 0 if finding.found else 3


def install(args: argparse.Namespace) -> int:
    """Install one; does nothing where it is installed already."""
    from buildsys.toolchains.definitions import definition, folders_for
    from buildsys.toolchains.installing import install as install_toolchain

    findings_of([args.name])  # an unknown name is refused there
    described = definition(args.name, folders_for(os.path.join("recipes", "recipe.yaml")))
    folder = install_toolchain(args.name, described, os.environ, say)
    print(f"{args.name} is installed in {folder}")
    (finding,) = findings_of([args.name])
    if finding.found and finding.path != folder and not finding.path.startswith(f"{folder}/"):
        say(f"what counts is another one all the same, found first: {finding.path}")
    return 0


def trust(args: argparse.Namespace) -> int:
    """Agree to the script that a project's own toolchain file names."""
    from buildsys.toolchains.definitions import folders_for
    from buildsys.toolchains.entering import definition_file
    from buildsys.toolchains.entering import trust as trust_definition

    findings_of([args.name])
    path = definition_file(args.name, folders_for(os.path.join("recipes", "recipe.yaml")))
    assert path is not None  # it is known
    place = trust_definition(path, os.environ)
    print(f"{path} is trusted as it is now ({place})")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


WHATS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "list": ("which toolchains there are, and which are here", show_list),
    "show": ("all that is known of one", show),
    "install": ("install one from public registries, below the cache", install),
    "trust": ("let a project's own toolchain file run the script that it names", trust),
}
