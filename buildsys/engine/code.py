"""The digest of a rule's code: what decides its bytes, and nothing else.

A rule's module and all that it imports from the rooms that decide bytes are parsed, never
executed, imports inside functions included. Comments, docstrings, layout, annotations for the
type checker only (`if TYPE_CHECKING`) and the `RULE` table (its effect is in the options) do
not count; neither do modules that say `INTERCHANGEABLE_KERNEL = True`: other code for the same
bytes. A module that imports by computed names counts with every module of its package.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

from buildsys.engine.own_file import replace_file

if TYPE_CHECKING:
    from buildsys.engine.stamps import Stamps
    from buildsys.plan.graph import Json

OWN = "buildsys"
ROOMS = ("buildsys.quant", "buildsys.formats", "buildsys.models", "buildsys.rules")
# The contract between rules and the engine decides no bytes.
CONTRACT = frozenset({"buildsys.rules", "buildsys.rules.spec"})
# Trees differ between Python's versions; digests of them do not (see `_write`), imports may.
VERSION = [1, *sys.version_info[:2]]


class RuleCode:
    """Digests of rules' code, with a disposable memory: content of a module -> what it says.

    search: the folders of `sys.path`, where top-level packages are looked for.
    """

    def __init__(self, stamps: Stamps, store: str, search: Sequence[str]) -> None:
        self._stamps = stamps
        self._store = store
        self._search = search
        self._facts: dict[str, Json] = _read(store)
        self._listings: dict[str, frozenset[str]] = {}
        self._packages: dict[str, str | None] = {}
        self._modules: dict[str, tuple[str | None, list[str]]] = {}
        self._digests: dict[str, str] = {}
        self._changed = False

    def digest(self, module: str) -> str:
        """The digest of all code behind the rule in `module`."""
        if module not in self._digests:
            hasher = blake3()
            for name, tree in sorted(self.closure(module).items()):
                hasher.update(f"{name}\0{tree}\0".encode())
            self._digests[module] = hasher.hexdigest()
        return self._digests[module]

    def expire(self) -> None:
        """Files may have changed since; `stamps` must have been told as well."""
        self._digests.clear()
        self._listings.clear()
        self._modules.clear()

    def save(self) -> None:
        """Write what was learnt; silently not, where the disk does not take it."""
        if not self._changed:
            return
        try:
            replace_file(self._store, json.dumps({"version": VERSION, "modules": self._facts}))
        except OSError:
            return  # the next run parses again, and that is all
        self._changed = False

    def closure(self, module: str) -> dict[str, str]:
        """Every module that counts -> the digest of its tree."""
        found: dict[str, str] = {}
        waiting, seen = [module], {module}
        while waiting:
            name = waiting.pop()
            if name not in self._modules:
                self._modules[name] = self._look_at(name)
            tree, imports = self._modules[name]
            if tree is not None:
                found[name] = tree
            new = [each for each in imports if each not in seen]
            seen.update(new)
            waiting += new
        return found

    def _look_at(self, name: str) -> tuple[str | None, list[str]]:
        """The digest of a module's tree (None: it does not count) and the modules, or what may
        be modules, that it imports from rooms that count."""
        place = self._file(name)
        if place is None:
            return None, []
        facts = self._facts_of(name, place)
        if facts["kernel"]:
            return None, []
        top = name.partition(".")[0]
        rooms = ROOMS if top == OWN else (*ROOMS, top)
        imports = [*facts["imports"], *(self._siblings(name) if facts["computed"] else ())]
        counting = (each for each in imports if each.startswith(rooms) and each not in CONTRACT)
        return facts["tree"], [each for each in counting if _is_in(each, rooms)]

    def _facts_of(self, name: str, place: str) -> Json:
        content = self._stamps.file(place, follow=True)
        key = f"{name} {content}"
        if key not in self._facts:
            self._facts[key] = read_module(place, name)
            self._changed = True
        return self._facts[key]

    def _file(self, module: str) -> str | None:
        """The source file of a module that is there; no package is executed to find it."""
        top, _, rest = module.partition(".")
        if top not in self._packages:
            self._packages[top] = next(
                (
                    folder
                    for folder in self._search
                    if {top, f"{top}.py"} & self._listing(folder or ".")
                ),
                None,
            )
        folder = self._packages[top]
        if folder is None:
            return None
        *parents, last = [top, *rest.split(".")] if rest else [top]
        folder = os.path.abspath("/".join([folder or ".", *parents]))
        names = self._listing(folder)
        if f"{last}.py" in names:
            return f"{folder}/{last}.py"
        inside = f"{folder}/{last}"
        has_package = last in names and "__init__.py" in self._listing(inside)
        return f"{inside}/__init__.py" if has_package else None

    def _siblings(self, module: str) -> list[str]:
        place = self._file(module)
        assert place is not None
        package = module if place.endswith("/__init__.py") else module.rpartition(".")[0]
        names = self._listing(os.path.dirname(place))
        return [f"{package}.{name[:-3]}" for name in names if name.endswith(".py")]

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                self._listings[folder] = frozenset()
        return self._listings[folder]


def _is_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def _read(store: str) -> dict[str, Json]:
    try:
        with open(store, "rb") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    modules: dict[str, Json] = content["modules"]
    return modules


def read_module(place: str, name: str) -> Json:
    """What a module's source says.

    tree: digest of its syntax tree. imports: candidates for modules (a name imported from a
    package may be a module or not). kernel: it is interchangeable. computed: it imports by
    names that only running it would tell.
    """
    from buildsys.engine.syntax import describe

    with open(place, "rb") as file:
        return describe(file.read(), place, name)
