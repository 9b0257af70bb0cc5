"""Rule `script`: a run script from a Jinja template, every value quoted for the shell.

A value is quoted where it stands, so that no value of a recipe can become a command; a list
becomes one word per item. `| raw` leaves a value as it is: for words that the template's
author wrote, never for a variable. An undefined variable is an error. In a template whose name
ends in .py.j2 a value becomes a Python literal instead.

The template is searched in the `templates` folder of the user's project, then in the one that
travels with qbuild. Templates stand alone: no include, no import, for their bytes are in the
action key and others' would not be.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.spec import Rule, StepContext
from buildsys.share import shared_folder

if TYPE_CHECKING:
    import jinja2

    from buildsys.plan.graph import Json

RULE = Rule(
    name="script",
    doc="An executable script from a Jinja template. Every further option is a variable of the "
    "template; every value is quoted for the shell.",
    options={
        "template": {
            "type": "string",
            "minLength": 1,
            "description": "File name of the template, in templates/ of the project or of qbuild.",
        },
    },
    distributions=("jinja2",),
    open_options=True,
    templates=("template",),
)


def make(step: StepContext) -> None:
    """Render the template to the output, mode 0755."""
    path = find_template(str(step.options["template"]))
    variables = {name: value for name, value in step.options.items() if name != "template"}
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StepError(f"{path}: the template is not UTF-8") from error
    step.out.write_text(render(source, variables, path.name), encoding="utf-8", newline="")
    step.out.chmod(0o755)


def find_template(name: str) -> Path:
    """The template's file: an absolute path as it is, a name among those of qbuild.

    The engine has already replaced the name of a project's own template by its path.
    """
    path = Path(name)
    if not path.is_absolute():
        path = Path(shared_folder("templates")) / name
    if not path.is_file():
        shipped = sorted(file.name for file in Path(shared_folder("templates")).glob("*.j2"))
        raise StepError(f"there is no template '{name}'", remedy=f"Shipped: {', '.join(shipped)}.")
    return path


def render(source: str, variables: dict[str, Json], name: str) -> str:
    """The text of a template with every value quoted: for POSIX sh, or, where its name ends in
    .py.j2, as Python literals.

    Raises StepError, with the template's line, for undefined variables, values that have no
    text, a value inside shell quotes (quoted twice, it would be open to `$(...)`), and for
    what Jinja refuses.
    """
    import jinja2

    from buildsys.rules.python_quoting import check_values_are_expressions, python_literal
    from buildsys.rules.shell_quoting import check_values_stand_unquoted

    in_python = name.endswith(".py.j2")
    environment = _environment(python_literal if in_python else _words)
    check = check_values_are_expressions if in_python else check_values_stand_unquoted
    try:
        check(environment, source, name)
        return environment.from_string(source).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise StepError(f"{name}:{error.lineno}: {error.message}") from error
    except jinja2.UndefinedError as error:
        given = ", ".join(variables) or "none"
        raise StepError(f"{name}: {error.message}", remedy=f"Variables given: {given}.") from error
    except jinja2.TemplateError as error:
        raise StepError(f"{name}: {error.message}") from error
    except TypeError as error:
        # Jinja has no class of its own for an include without a loader, or a bad operand.
        raise StepError(f"{name}: {error}") from error


def _environment(literal: Callable[[Json], str]) -> jinja2.Environment:
    """Jinja with `literal` around every value that is put into the text."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Raw(str):
        """Text that its author vouches for; anything done to it gives plain text again."""

    def quoted(value: object) -> str:
        if isinstance(value, jinja2.Undefined):
            return str(value)  # raises: StrictUndefined
        if isinstance(value, Raw):
            return value
        if literal is _words and isinstance(value, list | tuple):
            return " ".join(quoted(item) for item in value)
        return literal(value)

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=quoted,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["raw"] = lambda value: Raw(_text_of(value))
    return environment


def _words(value: Json) -> str:
    """One word of a shell."""
    return shlex.quote(_text_of(value))


def _text_of(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise StepError(f"a {type(value).__name__} has no text in a script: {value!r}")
    if "\0" in str(value):
        raise StepError("no word of a script can hold a NUL character")
    return str(value)
