"""An op package's Makefile, from its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.qualcomm.targets import HEXAGONS, TARGETS, complete

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.plan.graph import Json

ANDROID_API = 21


def render_makefile(
    template: Path, package: str, archs: Mapping[str, Json], flags: Sequence[str], wanted: list[str]
) -> str:
    """The text. archs: the recipe's settings by arch; wanted: what `make all` makes.

    Raises StepError, with the template's line, for what Jinja refuses.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=_one_line,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = lambda words: "".join(f" {word}" for word in words)
    variables = {
        "package": package,
        "archs": complete(archs),
        "hexagons": HEXAGONS,
        "targets": TARGETS,
        "all": wanted,
        "flags": flags,
        "android": ANDROID_API,
    }
    try:
        source = template.read_text(encoding="utf-8")
        return environment.from_string(source).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise StepError(f"{template.name}:{error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise StepError(f"{template.name}: {error.message}") from error


def _one_line(value: object) -> object:
    """A list becomes words. Values are text of make, but a line of it stays one."""
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    if isinstance(text, str) and ("\n" in text or "#" in text):
        raise StepError(f"no value of a Makefile can hold a line break or '#': {text!r}")
    return text
