"""A plan with what the engine must know of its rules, in a form that a null build can read
without importing a rule, and the cache that holds it.

The cache is valid for one recipe and one set of -D words, and says what it was made from:
the recipe's files by content, qbuild's own files by stat, the installed distributions by name,
and folders that must not appear because the recipe would then mean another model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

import buildsys
from buildsys.engine.key import canonical, fixed_parts, key_digest
from buildsys.engine.own_file import replace_file
from buildsys.gpus import gpu_count
from buildsys.identity import distribution_versions, hash_file
from buildsys.plan.cached import from_json, to_json
from buildsys.share import PACKAGE, shared_folder

if TYPE_CHECKING:
    from buildsys.plan.graph import Json, Plan
    from buildsys.rules.spec import Rule

VERSION = 5
BEFORE_STEPS = ',"steps":['
# What decides how a recipe becomes a blueprint.
MAKERS = ("", "recipe", "plan", "rules", "engine")


class RuleFacts(NamedTuple):
    """What the engine needs of a `rules.spec.Rule`. parts: input -> parts of a model; memory:
    times the largest tensor, times all of them."""

    module: str
    distributions: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...]
    float_sums: bool
    worker: str
    resumable: bool = False
    memory: tuple[float, float] = (0.0, 0.0)


class Blueprint(NamedTuple):
    """fixed: step -> digest of the parts of its key that only the plan decides."""

    plan: Plan
    rules: Mapping[str, RuleFacts]
    fixed: Mapping[str, str]


def draw(plan: Plan, rules: Mapping[str, tuple[str, Rule]]) -> Blueprint:
    """The blueprint of a plan. rules: name -> (module, rule) for every rule that it uses."""
    facts = {name: facts_of(module, rule) for name, (module, rule) in rules.items()}
    fixed = {
        name: key_digest(fixed_parts(step, plan, facts[step.rule].templates))
        for name, step in plan.steps.items()
    }
    return Blueprint(plan, facts, fixed)


def facts_of(module: str, rule: Rule) -> RuleFacts:
    """What the engine needs of one rule. module: the one that holds it."""
    return RuleFacts(
        module=module,
        distributions=rule.distributions,
        parts={each: spec.parts for each, spec in rule.inputs.items() if spec.parts},
        templates=rule.templates,
        float_sums=rule.float_sums,
        worker=rule.worker,
        resumable=rule.resumable,
        memory=(rule.memory.largest, rule.memory.whole),
    )


def load(recipe: str, defines: Mapping[str, str]) -> tuple[Blueprint, tuple[str, ...]]:
    """Read, check and plan a recipe: the slow way. Also every file that was read for it."""
    from buildsys.plan.load import load_plan
    from buildsys.rules import find_rule, rule_modules

    plan, files = load_plan(recipe, defines)
    modules = rule_modules()
    used = {step.rule: (modules[step.rule], find_rule(step.rule)) for step in plan.steps.values()}
    return draw(plan, used), files


def write_cache(
    path: str, blueprint: Blueprint, files: tuple[str, ...], defines: Mapping[str, str]
) -> None:
    """Remember a blueprint; silently not, where the disk does not take it."""
    plan = blueprint.plan
    header = {
        "version": VERSION,
        "name": plan.name,
        "recipe": os.path.abspath(plan.recipe),
        "defines": dict(defines),
        "here": os.getcwd(),
        "home": os.path.expanduser("~"),
        "files": {os.path.abspath(file): hash_file(file) for file in files},
        "absent": [*folders_that_would_win(plan, files), *recipes_that_would_win(files)],
        "qbuild": own_stamp(),
        "plugins": {place: stamp_below(place) for place in plugin_places(blueprint)},
        "packages": packages_stamp(),
        "gpus": gpu_count(),
    }
    try:
        replace_file(path, json.dumps(header) + "\n", *_body_lines(blueprint))
    except OSError:
        return  # the recipe is read again next time, and that is all


def _body_lines(blueprint: Blueprint) -> Iterator[str]:
    """One JSON object, with a line for each step (see `engine.index`)."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    body = to_body(blueprint)
    rows = body["plan"].pop("steps")
    yield f"{encode(body)[:-1]}{BEFORE_STEPS}\n"
    yield ",\n".join(map(encode, rows))
    yield "\n]}\n"


def plan_lines(path: str, key: str) -> list[bytes] | None:
    """The lines of a remembered blueprint: its header; all but the steps, as a JSON object that
    ends with `BEFORE_STEPS` in place of what follows; a step each; the end of that. None where
    another one was written since. key: see `Cached`."""
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError:
        return None
    return lines if lines and blake3(lines[0]).hexdigest() == key else None


class Cached(NamedTuple):
    """A remembered blueprint that holds. name: its plan's; key: a digest of all that it was
    made from."""

    name: str
    key: str


def find_cache(path: str, recipe: str, defines: Mapping[str, str]) -> Cached | None:
    """Whether the remembered blueprint of this recipe and these -D words still holds."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
        header = json.loads(line)
        return _cached(header, line) if _holds(header, recipe, defines) else None
    except (OSError, ValueError):
        return None


def _cached(header: Json, line: bytes) -> Cached:
    return Cached(header["name"], blake3(line).hexdigest())


def read_cache(path: str, found: Cached) -> Blueprint | None:
    """The remembered blueprint; None where another one was written since."""
    try:
        with open(path, "rb") as file:
            if blake3(file.readline()).hexdigest() != found.key:
                return None
            body = json.loads(file.read())
    except (OSError, ValueError):
        return None
    body["plan"]["steps"] = body.pop("steps")
    return from_body(body)


def to_body(blueprint: Blueprint) -> Json:
    """A blueprint as JSON values."""
    return {
        "plan": to_json(blueprint.plan),
        "rules": {name: list(facts) for name, facts in blueprint.rules.items()},
        "fixed": dict(blueprint.fixed),
    }


def from_body(body: Json) -> Blueprint:
    """The blueprint that `to_body` wrote."""
    rules = {name: _facts(row) for name, row in body["rules"].items()}
    return Blueprint(from_json(body["plan"]), rules, body["fixed"])


def cached_recipe(path: str) -> str | None:
    """The recipe that a cache file is of (absolute), whether it still holds or not."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return header.get("recipe") if isinstance(header, dict) else None


def _holds(header: Json, recipe: str, defines: Mapping[str, str]) -> bool:
    return (
        header["version"] == VERSION
        and header["recipe"] == os.path.abspath(recipe)
        and header["defines"] == dict(defines)
        and header["here"] == os.getcwd()
        and header["home"] == os.path.expanduser("~")  # paths in recipes may begin with it
        and header["qbuild"] == own_stamp()
        and header["packages"] == packages_stamp()
        and all(stamp_below(place) == stamp for place, stamp in header["plugins"].items())
        and header.get("gpus") == gpu_count()  # what `device: auto` was taken for
        and all(os.path.isfile(f) and hash_file(f) == d for f, d in header["files"].items())
        and not any(os.path.lexists(place) for place in header["absent"])
    )


def _facts(row: Json) -> RuleFacts:
    module, distributions, parts, templates, float_sums, worker, resumable, memory = row
    by_input = {name: tuple(each) for name, each in parts.items()}
    found = (module, tuple(distributions), by_input, tuple(templates), float_sums, worker)
    return RuleFacts(*found, resumable, tuple(memory))


def folders_that_would_win(plan: Plan, files: tuple[str, ...]) -> list[str]:
    """Where a folder would take the place of a model that qbuild ships or fetches: beside any of
    the recipe's files, for each may name one, or here. files: those of the recipe."""
    names = []
    for source in plan.sources.values():
        if source.kind == "model":
            path = source.paths.get("path", "")
            names.append(source.options.get("hub") or os.path.basename(path))
    beside = {os.path.dirname(os.path.abspath(file)) for file in files} | {os.getcwd()}
    folders = {os.path.join(folder, name) for folder in beside for name in names if name}
    return sorted(folder for folder in folders if not os.path.isdir(folder))


def recipes_that_would_win(files: tuple[str, ...]) -> list[str]:
    """Where a file would take the place of a recipe of qbuild's that another one extends."""
    shipped = shared_folder("recipes")
    places = [os.path.abspath(file) for file in files]
    names = [os.path.basename(place) for place in places if os.path.dirname(place) == shipped]
    beside = {os.path.dirname(place) for place in places} - {shipped}
    words = [word for name in names for word in (name, f"recipes/{name}")]
    found = {os.path.join(folder, word) for folder in beside for word in words}
    return sorted(place for place in found if not os.path.lexists(place))


def own_stamp() -> str:
    """qbuild's version and a stamp of each file of it that has a say in blueprints."""
    hasher = blake3(f"{buildsys.__version__} {sys.version}".encode())
    for room in MAKERS:
        for line in _stamps_of(f"{PACKAGE}/{room}" if room else PACKAGE, deep=bool(room)):
            hasher.update(line.encode(errors="surrogateescape"))
    return hasher.hexdigest()


def plugin_places(blueprint: Blueprint) -> list[str]:
    """The folders of the packages, and the files of the single modules, that rules of other
    distributions are from: one that is installed editable changes under its version."""
    places = set()
    for facts in blueprint.rules.values():
        top, _, rest = facts.module.partition(".")
        file = getattr(sys.modules.get(facts.module), "__file__", None)
        if top != buildsys.__name__ and file is not None:
            steps = rest.count(".") + 1 if rest else 0
            steps += os.path.basename(file) == "__init__.py"
            place = os.path.abspath(file)
            for _ in range(steps):
                place = os.path.dirname(place)
            places.add(place)
    return sorted(places)


def stamp_below(place: str) -> str:
    """A stamp of a Python file, or of all that are in a folder."""
    try:
        if os.path.isdir(place):
            lines = list(_stamps_of(place, deep=True))
        else:
            found = os.stat(place)
            lines = [f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"]
    except OSError:
        return ""
    return blake3("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _stamps_of(folder: str, *, deep: bool) -> Iterator[str]:
    with os.scandir(folder) as scan:
        for entry in sorted(scan, key=lambda entry: entry.name):
            if entry.name.endswith(".py"):
                found = entry.stat()
                yield f"{entry.path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
            elif deep and entry.name != "__pycache__" and entry.is_dir():
                yield from _stamps_of(entry.path, deep=True)


def packages_stamp() -> str:
    """What is installed, as the names of distributions tell: a plugin, or a newer torch, shows."""
    versions = distribution_versions(sys.path)
    return blake3(canonical(sorted(versions.items())).encode()).hexdigest()
