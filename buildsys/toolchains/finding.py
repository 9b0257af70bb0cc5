"""Is a toolchain here, and which one: without starting any program."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.store.place import store_root
from buildsys.toolchains.definitions import definition
from buildsys.toolchains.entering import entered, how_to_trust, joined, why_untrusted
from buildsys.toolchains.installed import installed_folder
from buildsys.toolchains.places import UNSET, Found, in_folder, in_python, on_path

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

__all__ = ["Found", "Toolchains", "find", "find_toolchains", "how_to_get"]


class Toolchains(NamedTuple):
    """found: name -> what was found; missing: name -> why not, and what to do."""

    found: Mapping[str, Found]
    missing: Mapping[str, str]


def find_toolchains(
    names: Collection[str],
    folders: Sequence[str],
    environment: Mapping[str, str],
    memory: str | None = None,
) -> Toolchains:
    """Look for toolchains by name. Raises RecipeError for a definition that is wrong."""
    found: dict[str, Found] = {}
    missing: dict[str, str] = {}
    known = {part for name in names for part in name.split("+")}
    for name in sorted(known):
        described = definition(name, folders, memory)
        if described is None:
            missing[name] = f"nothing is known of it: there is no toolchains/{name}.yaml"
            continue
        outcome = find(described, environment, name)
        if isinstance(outcome, Found) and "enter" in described:
            untrusted = why_untrusted(name, described, folders, environment)
            outcome = entered(outcome, described["enter"])
            if untrusted:
                outcome = f"{untrusted}. If that may be: {how_to_trust(name)}"
        if isinstance(outcome, Found):
            found[name] = outcome
        else:
            missing[name] = outcome
    for name in sorted(name for name in names if "+" in name):
        parts = name.split("+")
        lacking = [f"{part}: {missing[part]}" for part in parts if part in missing]
        if lacking:
            missing[name] = "; ".join(lacking)
        else:
            found[name] = _together({part: found[part] for part in parts})
    return Toolchains(found, missing)


def _together(parts: Mapping[str, Found]) -> Found:
    """Several toolchains as one: `root` of the first, and `NAME.root` of each."""
    first = next(iter(parts.values()))
    fields = dict(first.fields)
    for name, part in parts.items():
        fields |= {f"{name}.{field}": value for field, value in part.fields.items()}
        fields = joined(fields, part.fields)
    return Found(fields, {name: part.fingerprint for name, part in parts.items()})


def find(described: Json, environment: Mapping[str, str], name: str = "") -> Found | str:
    """The first place that has the toolchain in a fitting version, or why none does.

    name: of the toolchain, under which `qbuild toolchain install` would have put it.
    """
    reasons: list[str] = []
    for place in described["find"]:
        wanted = place.get("versions") or described.get("versions") or {}
        own = installed_folder(name, described, environment) if place.get("installed") else None
        if place.get("installed") and own is None:
            outcome: Found | str = NOT_INSTALLED
        elif "python" in place:
            outcome = in_python(place, wanted, environment, own)
            if isinstance(outcome, Found):
                return _with_cache(outcome, name, environment)
        elif "program" in place:
            outcome = on_path(place, wanted, environment)
        else:
            outcome = in_folder(place, wanted, environment, own)
        if isinstance(outcome, Found):
            return outcome
        reasons += [outcome] if outcome not in reasons else []
    # Where it is missing altogether, that nobody installed it for us says nothing new.
    told = [reason for reason in reasons if reason != NOT_INSTALLED] or reasons
    how = f". {how_to_get(described)}" if described.get("get") else ""
    return " and ".join(_without_repeats(told)) + how


def _without_repeats(reasons: Sequence[str]) -> list[str]:
    """Several variables that are not set make one reason."""
    unset = [reason.split(" ")[0] for reason in reasons if reason.endswith(UNSET)]
    if len(unset) < 2:
        return list(reasons)
    others = [reason for reason in reasons if not reason.endswith(UNSET)]
    return [f"none of {', '.join(unset)} is set", *others]


def _with_cache(found: Found, name: str, environment: Mapping[str, str]) -> Found:
    """A folder below the store in which a toolchain's steps may keep what can be made again;
    empty where there is no store."""
    root = store_root(environment)
    cache = f"{root}/toolchains/{name}/cache" if root is not None and name else ""
    return found._replace(fields={**found.fields, "cache": cache})


NOT_INSTALLED = "it is not installed"


def how_to_get(described: Json) -> str:
    """What a person does about a toolchain that is missing, with the page where there is one."""
    get, page = str(described.get("get", "")), described.get("page")
    return f"{get}: {page}" if page else get
