"""`all` and `build` as far as most of them go: there is nothing to do.

Only where that cannot be said at once is the rest imported.
"""

from __future__ import annotations

import argparse

from buildsys.cli.build_words import add_folder_words, folder_words, say, say_kept
from buildsys.cli.main import read_defines
from buildsys.engine.project import find_place, named_recipe
from buildsys.engine.standing import Answer, Difference, look

LOCAL = "local"


def configure(parser: argparse.ArgumentParser, *, targets: bool) -> None:
    add_folder_words(parser, targets=targets)
    parser.add_argument(
        "-j", "--jobs", type=positive, metavar="N", help="steps at a time (default: processors)"
    )
    parser.add_argument(
        "--memory",
        type=amount,
        metavar="SIZE",
        help="for all steps together (default: what is free)",
    )
    parser.add_argument(
        "--executor",
        default=LOCAL,
        metavar="URL",
        help="where steps run: local, dask://HOST:PORT, dask://local?workers=N",
    )
    parser.add_argument("-k", "--keep-going", action="store_true", help="build what can be built")
    parser.add_argument("-n", "--dry-run", action="store_true", help="say what would run, and why")
    parser.add_argument("--strict", action="store_true", help="a skipped artifact is an error")
    parser.add_argument(
        "--force",
        action="append",
        nargs="?",
        const="",
        default=[],
        metavar="TARGET",
        help="build it in any case; without TARGET, all that is named (or everything)",
    )
    cached = parser.add_mutually_exclusive_group()
    cached.add_argument("--cache", metavar="URL", help="share artifacts with other machines")
    cached.add_argument("--no-cache", action="store_true", help="use no store, local or shared")
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="say why each step runs")
    loud.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("--trace", metavar="FILE", help="write what happened when, for Perfetto")
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: one event on a line, on standard output",
    )


def amount(word: str) -> int:
    """Bytes of "12GiB"."""
    from buildsys.recipe.quantities import memory_bytes

    try:
        return memory_bytes(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"'{word}' is not a number of 1 or more")
    return int(word)


def run(args: argparse.Namespace) -> int:
    """Build what is stale; 0, or the exit code that says what went wrong."""
    if args.force:
        from buildsys.cli.build_steps import take_recipe

        take_recipe(args)
    found = standing(args)
    if isinstance(found, Answer):
        return nothing_to_do(found, args)
    from buildsys.cli import build_steps

    code = build_steps.run_cone(found, args) if found is not None else None
    return build_steps.run(args) if code is None else code


def standing(args: argparse.Namespace) -> Answer | Difference | None:
    """What a build of the whole recipe found, if all is still as it was, or what differs; None
    where more is asked than that."""
    recipe, targets = folder_words(args)
    if targets or args.dry_run or args.force or args.strict or args.verbose:
        return None
    if args.trace is not None or args.log_format != "text" or args.executor != LOCAL:
        return None
    given = read_defines(args.defines)
    place = find_place(named_recipe(recipe, args.build_dir), given, args.build_dir)
    found = look(place) if place is not None else None
    if place is not None and isinstance(found, Answer):
        say_kept(place.defines, given)
    return found


def nothing_to_do(answer: Answer, args: argparse.Namespace) -> int:
    """Say so, as a build does that has looked at every step."""
    if not args.quiet:
        for line in answer.skipped:
            say(line)
        print(f"nothing to do: {counted(answer.fresh, 'artifact')} up to date")
    return 0


def counted(number: int, what: str) -> str:
    return f"1 {what} is" if number == 1 else f"{number} {what}s are"
