"""The sources of an op package: where they lie in a folder, and what they need of QNN's headers.

mllm's LLaMAPackage has had two places, LLaMAOpPackageHtp/LLaMAPackage and
custom-op-package/LLaMAPackage, and for a time its Makefile one level above the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from buildsys.errors import StepError

DEPTH = 6  # levels below the given folder: a whole clone of mllm may be given
NOT_SOURCES = frozenset({"build", ".git"})
# QNN's own headers are included with quotes or brackets, some by their path.
INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]((?:HTP/|Qnn)[^">]+)[">]', re.MULTILINE)
# What came into the headers, or left them, between versions that are in use.
WATCHED = ("get_interface_scale", "DEF_TENSOR_PROPERTIES", "INIT_PKG_CORE_INIT_FUNC")


class OpSources(NamedTuple):
    """folder: that has src/ in it. makefile: the package's own, beside src/ or one level above."""

    folder: Path
    package: str
    makefile: Path | None


def find_op_sources(given: Path, package: str | None) -> OpSources:
    """The package in a folder, or somewhere below it. package: its name, if it is known.

    Raises StepError where there is none, or several.
    """
    found = sorted(_packages(given, DEPTH))
    if package is not None and len(found) > 1:
        found = [folder for folder in found if folder.name == package]
    if not found:
        called = f" called {package}" if package else ""
        raise StepError(
            f"there is no op package{called} in {given}: no folder with src/*.cpp and "
            "src/ops/*.cpp",
            remedy="Give the folder of the package, such as mllm's LLaMAPackage.",
        )
    if len(found) > 1:
        places = ", ".join(str(folder.relative_to(given)) for folder in found)
        raise StepError(
            f"there are several op packages in {given}: {places}",
            remedy="Give the folder of one of them, or its name: `package: NAME`.",
        )
    (folder,) = found
    # One level too high, as mllm has it; but never outside of what was given and digested.
    folders = [folder] if folder == given else [folder, folder.parent]
    makefiles = (place / "Makefile" for place in folders)
    makefile = next((path for path in makefiles if path.is_file()), None)
    return OpSources(folder, package or folder.name, makefile)


def _packages(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with the layout of an op package."""
    if any(folder.glob("src/*.cpp")) and any(folder.glob("src/ops/*.cpp")):
        yield folder
        return
    if depth:
        for inner in folder.iterdir():
            if inner.is_dir() and not inner.is_symlink() and inner.name not in NOT_SOURCES:
                yield from _packages(inner, depth - 1)


def check_headers(sources: OpSources, include: Path, version: str) -> None:
    """Do QNN's headers have what the sources use? Raises StepError naming the file and what.

    include: the SDK's include/QNN; version: the SDK's, for the message.
    """
    remedy = "An op package has to be built with the SDK that it was written for: set QNN_SDK_ROOT."
    declared: str | None = None
    for file in sorted(sources.folder.glob("src/**/*")):
        if file.suffix not in (".cpp", ".h", ".hpp"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        where = file.relative_to(sources.folder)
        for header in INCLUDED.findall(text):
            if not (include / header).is_file() and not (file.parent / header).is_file():
                raise StepError(
                    f"{where} includes {header}, which QNN SDK {version} does not have ({include})",
                    remedy=remedy,
                )
        for word in WATCHED:
            if not re.search(rf"\b{word}\b", text):
                continue
            declared = _headers(include) if declared is None else declared
            if not re.search(rf"\b{word}\b", declared):
                raise StepError(
                    f"{where} uses {word}, which the headers of QNN SDK {version} do not "
                    f"declare ({include})",
                    remedy=remedy,
                )


def _headers(include: Path) -> str:
    """The text of all headers of ops."""
    files = sorted((include / "HTP").glob("**/*.h"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
