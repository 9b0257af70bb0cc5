"""Where a step computes: a rule's option `device` becomes cpu or cuda before a key is made.

What `auto` means here is decided once, with the plan, so that it is a part of the key like any
option, and `why` can name it. A step on cuda reserves a GPU; where there is none it is refused
(or skipped, if optional) before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from buildsys.errors import RecipeError
from buildsys.rules.spec import DEVICES

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.recipe.recipe import ArtifactEntry
    from buildsys.rules.spec import Rule


def takes_device(rule: Rule) -> bool:
    """Has the rule the option `device` with qbuild's own three words?"""
    return tuple(rule.options.get("device", {}).get("enum", ())) == DEVICES


def with_device(
    options: Mapping[str, Json], resources: Mapping[str, Json], cuda: bool
) -> tuple[dict[str, Json], dict[str, Json]]:
    """Options and resources of a step whose rule takes a device. cuda: does torch have one?"""
    device, gpus = options["device"], int(resources.get("gpu") or 0)
    if device == "auto":
        device = "cuda" if cuda or gpus else "cpu"
    reserved = {"gpu": max(gpus, 1)} if device == "cuda" else {}
    return {**options, "device": device}, {**resources, **reserved}


def device_mistakes(entry: ArtifactEntry, options: Mapping[str, Json]) -> Iterator[RecipeError]:
    """A step that reserves a GPU and computes beside it."""
    if options["device"] == "cpu" and entry.resources.get("gpu"):
        given = entry.options.entries.get("device")
        yield RecipeError(
            f"'{entry.name}' reserves a GPU and computes on the CPU",
            remedy="set `device: cuda` (or auto), or reserve none",
            location=entry.where if given is None else given.where,
        )
