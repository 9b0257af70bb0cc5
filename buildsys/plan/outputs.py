"""Output paths: which names may be one, and which may stand beside each other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from buildsys.errors import Location, RecipeError

MAX_COMPONENT = 200  # bytes: room for a suffix while it is staged, within the usual 255
MAX_PATH = 1000
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f-\x9f\\:*?"<>|\[\]\ud800-\udfff\u2028\u2029]')
RESERVED = ".qbuild"


class Output(NamedTuple):
    """One output path, the artifact that it belongs to, and where it is written."""

    path: str
    step: str
    where: Location


def check_name(path: str, where: Location) -> Iterator[RecipeError]:
    """What is wrong with an output path, if anything.

    An output lies inside the build folder, on any file system (also one that is blind to
    case, like a phone's), and is safe as an argument of a program.
    """

    def wrong(why: str, remedy: str | None = None) -> RecipeError:
        return RecipeError(f"output '{printable(path)[:80]}' {why}", remedy=remedy, location=where)

    bad = FORBIDDEN.search(path)
    parts = path.removesuffix("/").split("/")
    if path in ("", "/"):
        yield RecipeError("an output needs a name", location=where)
    elif bad is not None:
        yield wrong(f"has '{printable(bad.group())}' in it, which no output name may have")
    elif path.startswith("/"):
        yield wrong("is an absolute path", "outputs are relative to the build folder")
    elif path.startswith("~"):
        yield wrong("begins with '~', which shells replace")
    elif ".." in parts:
        yield wrong("leads out of the build folder")
    elif "." in parts or "" in parts:
        yield wrong("has an empty part", "write it without '.' and '//'")
    elif any(part.startswith("-") for part in parts):
        yield wrong("has a part that begins with '-', which programs take for an option")
    elif any(part != part.strip() for part in parts):
        yield wrong("has a part that begins or ends with a space")
    elif any(part.casefold().startswith(RESERVED) for part in parts):
        yield wrong(f"begins with '{RESERVED}', which is qbuild's own")
    elif any(len(part.encode()) > MAX_COMPONENT for part in parts) or len(path) > MAX_PATH:
        yield wrong("is too long for a file name")


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def folded(path: str) -> str:
    """What a file system that is blind to case and to Unicode forms takes a path for."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def check_together(outputs: Iterable[Output]) -> Iterator[RecipeError]:
    """Outputs that cannot both exist: one name twice, or a file where a folder has to be."""
    taken: dict[str, Output] = {}
    for output in outputs:
        key = folded(output.path.removesuffix("/"))
        if key in taken:
            yield twice(output, taken[key])
        else:
            taken[key] = output
    for key, output in taken.items():
        for at in [place for place, letter in enumerate(key) if letter == "/"]:
            outer = taken.get(key[:at])
            if outer is not None:
                kind = "folder" if outer.path.endswith("/") else "file"
                yield RecipeError(
                    f"output '{output.path}' lies inside '{outer.path}', which is a {kind} that "
                    f"'{outer.step}' makes ({outer.where})",
                    location=output.where,
                )


def twice(output: Output, first: Output) -> RecipeError:
    same = output.path == first.path
    remedy = "give one of them another path under `outputs`"
    if output.where == first.where:
        remedy = "put every axis of its matrix into the name"
    return RecipeError(
        f"two artifacts make '{output.path}': '{first.step}' ({first.where}) is the other"
        if same
        else f"outputs '{output.path}' and '{first.path}' ({first.where}) are one file where "
        "case does not count",
        remedy=remedy,
        location=output.where,
    )
