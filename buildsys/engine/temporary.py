"""Temporary artifacts: kept as long as somebody has yet to read them, and no longer."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from buildsys.engine.staging import remove_tree
from buildsys.plan.targets import steps_read

if TYPE_CHECKING:
    from buildsys.engine.staleness import Survey


class Temporaries:
    """Removes each temporary artifact when all that read it are fresh.

    kept: steps that were asked for by name; and one that nothing reads is no intermediate.
    before_removal: waits until a thread that may be copying an artifact has done so.
    """

    def __init__(self, root: str, survey: Survey, kept: Collection[str]) -> None:
        self._root = root
        self._survey = survey
        self.before_removal: Callable[[], None] = lambda: None
        plan = survey.plan
        self._readers: dict[str, list[str]] = {
            name: [] for name, step in plan.steps.items() if step.temporary and name not in kept
        }
        for name, step in plan.steps.items() if self._readers else ():
            for maker in steps_read(plan, step):
                if maker in self._readers:
                    self._readers[maker].append(name)

    def settled(self, name: str) -> None:
        """A step is fresh: is it the last reader of something?"""
        for maker in steps_read(self._survey.plan, self._survey.plan.steps[name]):
            if maker in self._readers:
                self._remove_if_done(maker)

    def sweep(self) -> None:
        """All of them: a build may have been killed before it removed one."""
        for name in self._readers:
            self._remove_if_done(name)

    def needed(self, name: str, chosen: Collection[str]) -> bool:
        """Does anything that may run read this step's outputs?"""
        readers = self._readers.get(name)
        return readers is None or not readers or any(each in chosen for each in readers)

    def _remove_if_done(self, name: str) -> None:
        verdicts = self._survey.verdicts
        states = [
            verdicts[each].state if each in verdicts else None for each in self._readers[name]
        ]
        live = [state for state in states if state != "skipped"]
        own = verdicts.get(name)
        if not live or own is None or own.state != "fresh" or any(s != "fresh" for s in live):
            return
        self.before_removal()
        for path in self._survey.plan.steps[name].outputs.values():
            place = f"{self._root}/{path.rstrip('/')}"
            if os.path.lexists(place):
                remove_tree(place)
        verdicts[name] = own._replace(absent=True)
