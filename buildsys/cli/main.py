"""The command `qbuild`: finds the verb, parses, calls it, prints errors.

One file per verb in this folder, each with `HELP`, `configure(parser)` and `run(args) -> int`.
Only the verb that is asked for is imported.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence

import buildsys
from buildsys.errors import QbuildError, UsageError, disk_error, is_for_people

INTERRUPTED = 130
VERBS = {
    "all": "build every artifact of the recipe that is stale",
    "build": "build the named artifacts and what they need",
    "adopt": "take an artifact that was made elsewhere",
    "clean": "remove artifacts",
    "status": "what is fresh, stale, skipped or orphaned",
    "why": "why an artifact would be built again",
    "log": "what a step said when it last ran",
    "shell": "a shell, or a program, in a step's place",
    "graph": "what depends on what",
    "check": "read the recipe and say what is wrong with it",
    "inspect": "what is inside a checkpoint, a rotation, a .mllm",
    "deploy": "put artifacts on devices, and run them there",
    "doctor": "which toolchains are here, and how to get the others",
    "toolchain": "list, show and install toolchains",
    "worker": "run steps for builds on other machines (Dask)",
    "cache": "what the store holds; check it, collect its garbage",
    "schema": "the JSON Schema of recipes, for editors",
}
# What stands after `--` is for the program that these run.
PASS_ON = ("deploy", "shell")


def make_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `verb` only: the other verbs are not imported."""
    parser = argparse.ArgumentParser(
        prog="qbuild", description=buildsys.__doc__, formatter_class=help_format
    )
    parser.add_argument("--version", action="version", version=f"qbuild {buildsys.__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, prog="qbuild")
    for name, summary in VERBS.items():
        if verb in (None, name):
            sub = commands.add_parser(
                name, help=summary, description=summary, formatter_class=help_format
            )
        if name == verb:
            importlib.import_module(f"buildsys.cli.{name}").configure(sub)
    return parser


def help_format(prog: str) -> argparse.HelpFormatter:
    """argparse's formatter, told the width: to find it out itself it imports every kind of
    compression that Python has, by way of shutil."""
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):
        columns = 80
    return argparse.HelpFormatter(prog, width=columns - 2)


def command() -> int:
    """The whole process. Most runs find nothing to do and leave no garbage worth a search; a
    build turns the collector on again."""
    gc.disable()
    open_standard_streams()
    code = main()
    gc.freeze()  # nor is there any sense in one last search at the end
    return code


def open_standard_streams() -> None:
    """Where the caller has closed one (`>&-`), it is /dev/null: else the next file that is opened
    had its number, and what is printed would be written to that."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one's own
            os.set_inheritable(opened, True)
            setattr(sys, name, open(opened, mode))  # noqa: SIM115 (for as long as the process)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 usage, 3 missing, 130)."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words and words[0] in VERBS else None
    rest: list[str] = []
    if verb in PASS_ON and "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1 :]
    args = parse(make_parser(verb), words)
    args.rest = rest
    try:
        code: int = importlib.import_module(f"buildsys.cli.{args.verb}").run(args)
    except KeyboardInterrupt:
        print("interrupted; finished steps are kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) went away: not an error, but Python would print one at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the edge: people's mistakes are printed, bugs keep their traceback
        told = disk_error(error) or error
        if not is_for_people(told):
            raise
        print(told, file=sys.stderr)
        return told.exit_code if isinstance(told, QbuildError) else QbuildError.exit_code
    return code


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments. Targets may stand after options too, where argparse stops looking."""
    args, rest = parser.parse_known_args(words)
    targets = getattr(args, "words", None)
    if rest and (not isinstance(targets, list) or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(targets, list):
        targets += rest
    return args


def read_defines(words: Sequence[str]) -> dict[str, str]:
    """`-D name=value` words -> names and values.

    Raises UsageError for a word without "=".
    """
    defines = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"-D {word}: expected -D NAME=VALUE")
        defines[name] = value
    return defines
