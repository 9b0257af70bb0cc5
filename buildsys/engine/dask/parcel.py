"""An order that may travel: what a step is made from, and where a worker gets it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from buildsys.engine.dask.exchange import cargo_action
from buildsys.engine.digest import PARTS, names_of, walk
from buildsys.engine.key import key_digest
from buildsys.engine.storing import action_key
from buildsys.store.actions import Action, Entry

if TYPE_CHECKING:
    from buildsys.engine.executor import Order
    from buildsys.plan.graph import Json


class Seen(NamedTuple):
    """A file of an input, as stat shows it. path: below the input (its own name for a file)."""

    path: str
    size: int
    inode: int
    mtime_ns: int
    executable: bool


class Cargo(NamedTuple):
    """One path that a step reads. place: where it is on the machine that asks; files: all that
    counts in it; key: under which the exchange has it, "" where it was not put there."""

    place: str
    folder: bool
    files: tuple[Seen, ...]
    folders: tuple[str, ...]
    key: str = ""

    @property
    def is_here(self) -> bool:
        """Are these very files readable under the same paths? Only to be asked on a machine
        that runs the same kernel: there, inode and time tell."""
        return all(self._is(each) for each in self.files)

    def path_of(self, file: str) -> str:
        return f"{self.place}/{file}" if self.folder else self.place

    def _is(self, seen: Seen) -> bool:
        path = self.path_of(seen.path)
        try:
            found = os.stat(path)
        except OSError:
            return False
        told = (found.st_size, found.st_ino, found.st_mtime_ns)
        return told == (seen.size, seen.inode, seen.mtime_ns) and os.access(path, os.R_OK)


class Parcel(NamedTuple):
    """token: names this attempt; step, rule: names;
    parts: of the action key, to be found the same by who runs it. context: the order's, with
    the paths of the machine that asks. machine: its id; url: of the exchange beside the store;
    known: a folder in the store that only those have who share it. again: run it although its
    outputs may be known."""

    token: str
    step: str
    rule: str
    parts: Mapping[str, Json]
    context: Mapping[str, Json]
    threads: int
    timeout: float | None
    memory_limit: int | None
    cargoes: tuple[Cargo, ...]
    machine: str
    url: str | None
    known: str
    again: bool


def encode(parcel: Parcel) -> str:
    return json.dumps(parcel._asdict())


def decode(text: str) -> Parcel:
    found = Parcel(**json.loads(text))
    cargoes = tuple(
        Cargo(place, folder, tuple(Seen(*each) for each in files), tuple(folders), key)
        for place, folder, files, folders, key in found.cargoes
    )
    return found._replace(cargoes=cargoes)


def cargoes_of(order: Order) -> list[Cargo]:
    """Everything that a step reads, as stat shows it now. Raises OSError."""
    found: dict[str, Cargo] = {}
    for items in order.context["inputs"].values():
        for item in items:
            for path in item["paths"].values():
                found[path] = _cargo(path, item["kind"])
    for option in order.parts["templates"]:
        path = order.context["options"][option]
        found[path] = _cargo(path, "file")
    return list(found.values())


def _cargo(path: str, kind: str) -> Cargo:
    top = os.stat(path)
    if not stat.S_ISDIR(top.st_mode):
        return Cargo(path, False, (_seen(os.path.basename(path), top),), ())
    if kind == "model":
        return Cargo(path, True, tuple(_of_model(path)), ())
    files, folders = [], []
    for relative, found in walk(path, follow=kind != "artifact"):
        if stat.S_ISDIR(found.st_mode):
            folders.append(relative)
        else:
            files.append(_seen(relative, found))
    return Cargo(path, True, tuple(files), tuple(folders))


def _of_model(path: str) -> Iterator[Seen]:
    """Only the files that some rule may read: a model's folder may hold anything."""
    names = sorted(os.listdir(path))
    known = dict.fromkeys(name for part in PARTS for name in names_of(part, names))
    for name in known:
        yield _seen(name, os.stat(f"{path}/{name}"))


def _seen(path: str, found: os.stat_result) -> Seen:
    executable = bool(found.st_mode & stat.S_IXUSR)
    return Seen(path, found.st_size, found.st_ino, found.st_mtime_ns, executable)


def handed_key(parts: Mapping[str, Json], token: str) -> str:
    """Under which an attempt's outputs are handed over. It is not the action's key: whether what
    the step read is still so, only the machine that asks can tell, when it commits."""
    return blake3(f"{action_key(key_digest(parts))} {token}".encode()).hexdigest()


def packed(cargo: Cargo, digest: Callable[[str], str]) -> tuple[Cargo, Action, dict[str, str]]:
    """A cargo with its key, its action, and the places of its files. digest: of a file."""
    places = {each.path: cargo.path_of(each.path) for each in cargo.files}
    files = tuple(
        Entry(each.path, digest(places[each.path]), each.size, each.executable)
        for each in cargo.files
    )
    key, action = cargo_action(files, cargo.folders)
    return cargo._replace(key=key), action, places


def moved(context: Mapping[str, Json], places: Mapping[str, str], templates: Sequence[str]) -> Json:
    """A context whose inputs and templates are where `places` says (old path -> new)."""
    inputs = {
        name: [
            {**item, "paths": {role: places[path] for role, path in item["paths"].items()}}
            for item in items
        ]
        for name, items in context["inputs"].items()
    }
    options = dict(context["options"])
    for option in templates:
        options[option] = places[options[option]]
    return {**context, "inputs": inputs, "options": options}
