"""Did everything that a step reads stay as it was while the step ran?

Digests alone cannot tell: an input may be changed and changed back between two looks, and the
step has read what was there in between. Such a change leaves another stamp (inode, times), and
a resumable step's work so far is only good for the stamps that it was begun under.
"""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

from buildsys.engine.digest import UnfitContent, artifact_files, artifact_folders, source_files
from buildsys.engine.key import Reason
from buildsys.engine.stamps import stamp_of
from buildsys.store.local import LINKED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from buildsys.engine.blueprint import Blueprint
    from buildsys.engine.stamps import Stamp, Stamps
    from buildsys.plan.graph import Json, Step

SIZE, CTIME = 2, 4  # places in a stamp


class Witness:
    """Of the steps of one build; called by the engine's thread.

    Invariant: `_begun[step]` says how many moves (of files, links, folders) had been noticed
    before the step began; whatever moves while it runs is noticed after them.
    """

    def __init__(
        self, blueprint: Blueprint, stamps: Stamps, template: Callable[[str], str]
    ) -> None:
        self._blueprint = blueprint
        self._stamps = stamps
        self._template = template
        self._begun: dict[str, tuple[int, int]] = {}
        self._marks: dict[str, Stamp | None] = {}
        self._moved: list[str] = []
        self._files: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self._folders: dict[str, list[str]] = {}
        self._ways: dict[str, list[str]] = {}

    def begins(self, step: Step) -> None:
        """A step is about to be started; all that it reads was looked at before."""
        self._look_at_links(step)
        self._begun[step.name] = (len(self._stamps.moved), len(self._moved))

    def expire(self) -> None:
        """As `Stamps.expire`: folders may have other entries now."""
        self._files.clear()
        self._folders.clear()

    def moved(self, step: Step) -> list[Reason]:
        """What a step reads that was written or touched since it began, though all of it has
        the content that it had then. Everything must have been looked at anew. Nothing is said
        of a step that did not begin, but was restored."""
        begun = self._begun.pop(step.name, None)
        if begun is None:
            return []
        self._look_at_links(step)
        since, links = self._stamps.moved[begun[0] :], self._moved[begun[1] :]
        if not since and not links:
            return []
        reads = {*self._sources(step), *self._marked(step), *self._artifacts(step)}
        names = [each.name for each in since if not is_relink(*each)] + links
        return [
            Reason(f"{name} was written or touched, though it holds the same now")
            for name in dict.fromkeys(names)
            if name in reads
        ]

    def stamps_of(self, step: Step) -> dict[str, Json]:
        """The stamps of all that a step reads. Not the device: it may have another number after
        a restart."""
        found: dict[str, Json] = {}
        for name in self._sources(step):
            both = (self._mark_of(name), self._stamps.stamp(name, follow=True))
            found[name] = [each and each[1:] for each in both]
            for link in self._links_on_the_way(name):
                found[link] = (self._mark_of(link) or ())[1:]
        for name in self._artifacts(step):
            stamp = self._stamps.stamp(name, follow=False)
            # The store may link and unlink what is as large as that: its ctime says nothing.
            found[name] = stamp and stamp[1 : CTIME + (stamp[SIZE] < LINKED)]
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # as it is read back

    def _sources(self, step: Step) -> Iterator[str]:
        """The names of all files, links and folders that a step reads of sources."""
        facts = self._blueprint.rules[step.rule]
        for option in facts.templates:
            yield self._template(str(step.options[option]))
        for given, refs in step.inputs.items():
            for ref in refs:
                if ref.kind == "source":
                    yield from self._files_of(ref.name, facts.parts.get(given, ()))

    def _files_of(self, name: str, parts: tuple[str, ...]) -> list[str]:
        if (name, parts) not in self._files:
            source = self._blueprint.plan.sources[name]
            self._files[name, parts] = list(source_files(self._stamps, source, parts))
        return self._files[name, parts]

    def _artifacts(self, step: Step) -> Iterator[str]:
        for refs in step.inputs.values():
            for ref in refs:
                if ref.kind == "artifact":
                    yield from artifact_files(self._stamps, ref.name)

    def _marked(self, step: Step) -> Iterator[str]:
        """The names of what tells by itself, and not by a digest, that it was another for a
        while: links, folders of sources, folders of artifacts."""
        for name in self._sources(step):
            yield from self._links_on_the_way(name)
            if self._marks.get(name, ()) is not None:
                yield name  # but a file that becomes a link has another inode, or another ctime
        for refs in step.inputs.values():
            for ref in refs:
                if ref.kind == "artifact" and ref.name[-1] == "/":
                    yield from self._folders_of(ref.name)

    def _folders_of(self, artifact: str) -> list[str]:
        if artifact not in self._folders:
            try:
                self._folders[artifact] = list(artifact_folders(self._stamps, artifact))
            except UnfitContent:  # somebody has put it there just now: its digest will tell
                self._folders[artifact] = [artifact]
        return self._folders[artifact]

    def _links_on_the_way(self, name: str) -> list[str]:
        """The links among the folders that a source lies in, as they are when it is first read."""
        folder = os.path.dirname(name)
        if folder not in self._ways:
            self._ways[folder] = links_on_the_way(folder)
        return self._ways[folder]

    def _look_at_links(self, step: Step) -> None:
        """Links that lead elsewhere for a while leave no trace on what they lead to, and files
        that are there for a while leave one on their folder alone."""
        for name in self._marked(step):
            mark = self._mark_of(self._stamps.path(name).rstrip("/"))
            if self._marks.setdefault(name, mark) != mark:
                self._marks[name] = mark
                self._moved.append(name)

    def _mark_of(self, name: str) -> Stamp | None:
        """The stamp of a link or a folder; None for a file, whose digest has its own."""
        try:
            found = os.lstat(name)
        except OSError:
            return None  # gone since: whoever reads it says so
        return None if stat.S_ISREG(found.st_mode) else stamp_of(found)


def links_on_the_way(folder: str) -> list[str]:
    """The links that the system follows to get to a folder, the folder itself among them."""
    found: dict[str, None] = {}
    waiting, seen = [folder], set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        above = os.path.dirname(place)
        waiting.append(above)
        if os.path.islink(place):
            found[place] = None
            waiting.append(os.path.join(above, os.readlink(place)))
    return list(found)


def is_relink(name: str, before: Stamp, now: Stamp) -> bool:
    """Has a link of an artifact to or from the store come or gone, and nothing else?"""
    return name[0] != "/" and before[:CTIME] == now[:CTIME] and now[SIZE] >= LINKED
