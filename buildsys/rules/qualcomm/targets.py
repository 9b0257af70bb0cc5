"""What an op package is built for, and with which of Qualcomm's tools.

Versions are those of SDK-generated Makefiles; each hangs on the SDK that is installed, and a
recipe may give another. Source: public op packages (mllm's LLaMAPackage, executorch's example).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from buildsys.errors import StepError
from buildsys.toolchains.versions import version_of

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

SDK = "$(HEXAGON_SDK_ROOT)"


class Tools(NamedTuple):
    """version: the usual one; least: the oldest that knows the arch."""

    version: str
    least: str


TOOLS = {
    "v68": Tools("8.4.09", "8.4"),
    "v69": Tools("8.5.03", "8.5"),
    "v73": Tools("8.7.06", "8.6"),
    "v75": Tools("8.7.06", "8.7"),
    "v79": Tools("19.0.04", "8.8"),
    "v81": Tools("19.0.04", "19.0"),
    # libnative is in every one of them.
    "x86": Tools("8.7.06", "8.4"),
    "aarch64": Tools("8.7.06", "8.4"),
}
ARCHS = tuple(TOOLS)
HEXAGONS = tuple(arch for arch in ARCHS if arch.startswith("v"))
TARGETS = tuple(f"htp_{arch}" for arch in ARCHS)
MAKE_TEXT = {"type": "string", "pattern": r"^[^\n#]+$"}
_FLAGS: Json = {"type": "array", "items": MAKE_TEXT}
ARCH_OPTIONS: dict[str, Json] = {
    "type": "object",
    "default": {},
    "description": "What is special about an arch (v68 ... v81, x86, aarch64): `tools` and `sdk` "
    "(version and root; text of make), `qurt` (folder below rtos/qurt), `flags`, `link_flags`.",
    "additionalProperties": False,
    "properties": {
        arch: {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "tools": {"type": "string", "pattern": r"^\d+(\.\d+)+$"},
                "sdk": MAKE_TEXT,
                "flags": _FLAGS,
                "link_flags": _FLAGS,
                **({"qurt": MAKE_TEXT} if arch.startswith("v") else {}),
                **({"compiler": MAKE_TEXT} if arch == "x86" else {}),
            },
        }
        for arch in ARCHS
    },
}


def complete(given: Mapping[str, Json]) -> dict[str, dict[str, Json]]:
    """Every arch's settings: the recipe's, else the usual ones."""
    settings: dict[str, dict[str, Json]] = {}
    for arch, tools in TOOLS.items():
        usual: dict[str, Json] = {"sdk": SDK, "tools": tools.version, "flags": []}
        usual |= {"link_flags": [], "qurt": f"compute{arch}", "compiler": "clang++"}
        settings[arch] = {**usual, **given.get(arch, {})}
    return settings


def output_folder(target: str) -> str:
    """Where make puts what it makes for a target, below build/."""
    arch = target.removeprefix("htp_")
    other = {"x86": "x86_64-linux-clang", "aarch64": "aarch64-android"}
    return other.get(arch, f"hexagon-{arch}")


def machine(target: str) -> str:
    """The machine of what comes out, as formats/elf_file.py names it."""
    arch = target.removeprefix("htp_")
    return {"x86": "x86-64", "aarch64": "AArch64"}.get(arch, f"Hexagon {arch}")


def toolchain_of(options: Mapping[str, Json]) -> str:
    """The SDKs that a target takes; all but the NDK for every one."""
    both = "qnn-sdk+hexagon-sdk"
    return f"{both}+android-ndk" if options.get("target") == "htp_aarch64" else both


def chosen_tools(arch: str, given: str | None, installed: list[str]) -> str:
    """The version of the tools: as the recipe says, else the usual one, else the newest that is
    installed and knows the arch. Raises StepError where that is none."""
    usual, least = TOOLS[arch]
    known = ", ".join(sorted(installed, key=version_of)) or "none"
    if given is not None:
        if given not in installed:
            raise StepError(
                f"the Hexagon SDK has no tools {given}, but: {known}",
                remedy=f"Give one of these in `archs: {{{arch}: {{tools: ...}}}}`.",
            )
        if version_of(given) < version_of(least):
            raise StepError(f"tools {given} do not know {arch}: {least} is the first to")
        return given
    able = [version for version in installed if version_of(version) >= version_of(least)]
    if not able:
        raise StepError(
            f"no tools of the Hexagon SDK know {arch} (there: {known}; {least} is needed)",
            remedy="Install a newer Hexagon SDK and set HEXAGON_SDK_ROOT to it.",
        )
    return usual if usual in able else max(able, key=version_of)
