"""Whether this machine would make what a key says: its own look at everything in it that is a
machine's, not the plan's: the rule's code, versions, toolchain, class of processor."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from buildsys.engine.blueprint import facts_of
from buildsys.engine.code import RuleCode
from buildsys.engine.key import differences, processor_class
from buildsys.engine.stamps import Stamps
from buildsys.identity import distribution_versions, normal_name
from buildsys.rules import find_rule, rule_modules
from buildsys.toolchains.finding import find_toolchains

if TYPE_CHECKING:
    from buildsys.engine.blueprint import RuleFacts
    from buildsys.plan.graph import Json


class Derivation:
    """Looks parts of keys up as they are here and now. toolchains: folders of definitions;
    scratch: a folder for what is disposable."""

    def __init__(self, toolchains: Sequence[str], scratch: str) -> None:
        self._folders = toolchains
        self._stamps = Stamps(scratch, f"{scratch}/stamps")
        self._code = RuleCode(self._stamps, f"{scratch}/code", tuple(sys.path))

    def facts(self, rule: str) -> RuleFacts | None:
        """None where no such rule is installed here."""
        modules = rule_modules()
        return facts_of(modules[rule], find_rule(rule)) if rule in modules else None

    def objections(self, facts: RuleFacts, parts: Mapping[str, Json]) -> list[str]:
        """What is not here as the key says; for people."""
        self._stamps.expire()
        self._code.expire()
        versions = distribution_versions(sys.path)
        names = [normal_name(name) for name in facts.distributions]
        here: dict[str, Json] = {
            **parts,
            "code": self._code.digest(facts.module),
            "versions": {name: versions.get(name) for name in names},
            "isa": processor_class() if facts.float_sums else None,
            "toolchain": self._fingerprints(parts["toolchain"]),
        }
        return [str(reason) for reason in differences(parts, here)]

    def fields(self, name: str) -> Mapping[str, str]:
        """What a step is told of its toolchain here."""
        return find_toolchains([name], self._folders, os.environ).found[name].fields

    def _fingerprints(self, names: Mapping[str, Json]) -> dict[str, Json]:
        found = find_toolchains(names, self._folders, os.environ).found if names else {}
        return {name: found[name].fingerprint if name in found else None for name in names}
