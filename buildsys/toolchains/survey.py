"""What is known of every toolchain on this machine: the answer behind `qbuild doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.toolchains.definitions import definition, known_names
from buildsys.toolchains.entering import how_to_trust, why_untrusted
from buildsys.toolchains.finding import Found, find

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


class Finding(NamedTuple):
    """One toolchain. version, path: empty where it is missing or tells none; why: what was looked
    for in vain; get, page: what mends that; install: `qbuild toolchain install` can."""

    name: str
    doc: str
    found: bool
    version: str
    path: str
    unlocks: tuple[str, ...]
    why: str
    get: str
    page: str
    install: bool


def survey(
    folders: Sequence[str], environment: Mapping[str, str], names: Sequence[str] = ()
) -> list[Finding]:
    """Look for the named toolchains, or for all. Executes nothing; raises RecipeError."""
    findings = []
    for name in names or known_names(folders):
        described = definition(name, folders)
        if described is not None:
            findings.append(look(name, described, folders, environment))
    return findings


def look(
    name: str, described: Json, folders: Sequence[str], environment: Mapping[str, str]
) -> Finding:
    """What is known of one toolchain."""
    # Without "get", the reason alone: what mends it is a field of its own.
    bare = {key: value for key, value in described.items() if key != "get"}
    outcome = find(bare, environment, name)
    untrusted = None
    if isinstance(outcome, Found) and "enter" in described:
        untrusted = why_untrusted(name, described, folders, environment)
        outcome = untrusted or outcome
    fields = outcome.fields if isinstance(outcome, Found) else {}
    tool = fields.get("distribution") or fields.get("program", "").rpartition("/")[2]
    version = " ".join(filter(None, (tool, fields.get("version", ""))))
    return Finding(
        name=name,
        doc=str(described.get("doc", "")),
        found=isinstance(outcome, Found),
        version=tool if tool.endswith(f"-{fields.get('version')}") else version,
        path=fields.get("root", ""),
        unlocks=tuple(map(str, described.get("unlocks") or ())),
        why="" if isinstance(outcome, Found) else outcome,
        get=how_to_trust(name) if untrusted else str(described.get("get", "")),
        page="" if untrusted else str(described.get("page", "")),
        install="install" in described and not untrusted,
    )
