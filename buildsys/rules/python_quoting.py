"""Where in a Python script does the value of a template stand?

`repr` makes one literal of any value, but only where Python reads expressions: inside a string
or a comment its result would be read otherwise, and could end the string. The template is read
with a name in place of every value; what is not a name of its own then is refused.
"""

from __future__ import annotations

import io
import tokenize
from typing import TYPE_CHECKING

from buildsys.errors import StepError

if TYPE_CHECKING:
    import jinja2

    from buildsys.plan.graph import Json

REMEDY = "Assign it first, NAME = {{ value }}, and use NAME there."


def check_values_are_expressions(
    environment: jinja2.Environment, source: str, template: str
) -> None:
    """Raises StepError, with the line, for a value inside a string or a comment."""
    text, lines = _with_names(environment, source)
    found: dict[str, int] = dict.fromkeys(lines, 0)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in found:
                found[token.string] += 1
    except (tokenize.TokenError, SyntaxError) as error:
        raise StepError(f"{template}: this is no Python ({error})") from error
    for name, count in found.items():
        if count != 1:
            message = f"{template}:{lines[name]}: a value stands in a string or a comment"
            raise StepError(message, remedy=REMEDY)


def _with_names(environment: jinja2.Environment, source: str) -> tuple[str, dict[str, int]]:
    """The template's own text with a name of ours for every value, and their lines."""
    prefix = "qbuild_value"
    while prefix in source:
        prefix += "_"
    pieces: list[str] = []
    lines: dict[str, int] = {}
    for line, kind, text in environment.lex(source):
        if kind == "data":
            pieces.append(text)
        elif kind == "variable_begin":
            name = f"{prefix}_{len(lines)}"
            lines[name] = line
            pieces.append(name)
    return "".join(pieces), lines


def python_literal(value: Json) -> str:
    """The value as Python writes it. Raises StepError for what JSON does not have."""
    if value is not None and not isinstance(value, bool | str | int | float | list | dict):
        raise StepError(f"a {type(value).__name__} has no literal in a script: {value!r}")
    return repr(value)
