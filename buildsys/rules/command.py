"""Rule `command`: runs any program, given as an argument list and never as a shell string.

In `argv` and `env`, `${in.NAME}` is the path of an input, `${out}` and `${out.NAME}` those of
the outputs, `${toolchain.root}` and other fields those of the toolchain, `${jobs}` the number
of threads of the step. An argument that is nothing but `${in.NAME}` becomes one argument per
input of that name. `$${` stands for `${` itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from buildsys.errors import StepError
from buildsys.rules.spec import Command, Problem, Rule, StepContext
from buildsys.toolchains.entering import inside, variables

if TYPE_CHECKING:
    from buildsys.plan.graph import Json, Plan, Step

T = TypeVar("T")
PLACEHOLDER = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
KNOWN = "${in.NAME}, ${out}, ${out.NAME}, ${toolchain.root}, ${jobs}"


def check(step: Step, plan: Plan) -> Iterable[Problem]:
    """Placeholders that no input, output or toolchain of the step stands behind."""
    for option, text in _texts(step.options):
        for name in _names_in(text):
            problem = _problem_with(name, step)
            if problem is not None:
                message, remedy = problem
                yield Problem(message, remedy, option=option)


RULE = Rule(
    name="command",
    doc="Runs a program. Its working folder is a fresh one, it has no standard input, and its "
    "environment is PATH, HOME (the working folder) and what is declared.",
    options={
        "argv": {
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "description": f"The program and its arguments; filled in: {KNOWN}.",
        },
        "env": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "default": {},
            "description": "Environment variables of the program, filled in like argv.",
        },
    },
    open_inputs=True,
    rendered=("argv", "env"),
    check=check,
)


def command(step: StepContext) -> Command:
    """The program to run. Raises StepError for a placeholder that nothing stands behind."""
    argv = tuple(
        argument for template in step.options["argv"] for argument in _expand(template, step)
    )
    if not argv or not argv[0]:
        raise StepError(f"{step.name}: argv names no program")
    declared = {name: _render(text, step) for name, text in step.options["env"].items()}
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(_staging(step)),
        **variables(step.toolchain),
        **step.environment,
        **declared,
    }
    for name in environment:
        if not name or "=" in name or "\0" in name:
            raise StepError(f"{step.name}: no environment variable can be called {name!r}")
    for text in (*argv, *environment.values()):
        if "\0" in text:
            raise StepError(f"{step.name}: no argument of a program can hold a NUL character")
    return Command(inside(step.toolchain, argv), environment)


def _expand(template: str, step: StepContext) -> tuple[str, ...]:
    """One argument of the recipe -> arguments of the program: none or several for `${in.NAME}`."""
    whole = PLACEHOLDER.fullmatch(template)
    if whole is not None and (whole.group(1) or "").startswith("in."):
        return tuple(str(path) for path in _input_paths(whole.group(1)[len("in.") :], step))
    return (_render(template, step),)


def _render(template: str, step: StepContext) -> str:
    def value(match: re.Match[str]) -> str:
        return "${" if match.group(1) is None else _value(match.group(1), step)

    return PLACEHOLDER.sub(value, template)


def _value(name: str, step: StepContext) -> str:
    kind, _, field = name.partition(".")
    if name == "jobs":
        return str(step.threads)
    if kind == "in":
        paths = _input_paths(field, step)
        if len(paths) != 1:
            raise StepError(
                f"{step.name}: ${{{name}}} stands for {len(paths)} files inside one argument",
                remedy=f'Give "${{{name}}}" as an argument of its own.',
            )
        return str(paths[0])
    if kind == "out":
        return str(_lookup(field or "out", step.outputs, name, step))
    if kind == "toolchain":
        return _lookup(field, step.toolchain, name, step)
    raise StepError(f"{step.name}: unknown placeholder ${{{name}}}", remedy=f"Known: {KNOWN}.")


def _input_paths(name: str, step: StepContext) -> tuple[Path, ...]:
    return tuple(item.path for item in _lookup(name, step.inputs, f"in.{name}", step))


def _lookup(field: str, values: Mapping[str, T], name: str, step: StepContext) -> T:
    if field not in values:
        known = ", ".join(values) or "none"
        raise StepError(f"{step.name}: nothing stands behind ${{{name}}} (there is: {known})")
    return values[field]


def _staging(step: StepContext) -> Path:
    """The step's working folder: the main output lies in it under the artifact's name."""
    return step.out.parents[len(PurePosixPath(step.name).parts) - 1]


def _texts(options: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    yield from (("argv", text) for text in options.get("argv", ()))
    yield from (("env", text) for text in options.get("env", {}).values())


def _names_in(text: str) -> list[str]:
    return [match.group(1) for match in PLACEHOLDER.finditer(text) if match.group(1) is not None]


def _problem_with(name: str, step: Step) -> tuple[str, str] | None:
    kind, _, field = name.partition(".")
    if kind == "in":
        known = ", ".join(step.inputs) or "none"
        missing = field not in step.inputs
        return (f"no input is called '{field}'", f"Inputs: {known}.") if missing else None
    if kind == "out":
        known = ", ".join(output for output in step.outputs if output != "out") or "none"
        missing = bool(field) and field not in step.outputs
        return (f"no output is called '{field}'", f"Further outputs: {known}.") if missing else None
    if kind == "toolchain" and field:
        if step.toolchain is None:
            return f"${{{name}}} is used, and the step has no toolchain", "Add `toolchain: NAME`."
        return None
    return None if name == "jobs" else (f"unknown placeholder ${{{name}}}", f"Known: {KNOWN}.")
