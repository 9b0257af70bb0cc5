"""Which files go to a device, under which names: `push`, resolved to files of this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from buildsys.devices.errors import DeviceRefused
from buildsys.devices.names import checked_path, refuse_same
from buildsys.errors import RecipeError, ToolchainMissing
from buildsys.plan.globs import is_glob, matching

if TYPE_CHECKING:
    from buildsys.devices.definitions import Device, Push
    from buildsys.devices.host_files import HostFile, HostFiles
    from buildsys.plan.graph import Plan

TOOLCHAIN = "toolchain:"


class Item(NamedTuple):
    """One thing that `push` means. name: the artifact or source; of a toolchain's file
    what `push` calls it.
    path: where it lies here (a folder's ends in "/"). to: as in `push`."""

    name: str
    path: str
    to: str
    push: Push


class PushFile(NamedTuple):
    """One file. target: below the root. artifact: the `Item.name` that it is of,
    "" for none. npus: of a .mxq, what it was compiled for, as far as the build knows."""

    target: str
    path: str
    mode: int
    artifact: str
    facts: HostFile
    npus: frozenset[str] = frozenset()


def wanted_artifacts(device: Device, plan: Plan) -> list[str]:
    """The artifacts that the device takes: what has to be built. Raises RecipeError."""
    names = []
    for push in device.push:
        if not push.what.startswith(TOOLCHAIN):
            names += [name for name in _meant(push, plan) if name in plan.producer]
    return list(dict.fromkeys(names))


def _meant(push: Push, plan: Plan) -> list[str]:
    """Artifacts and sources that one line of `push` names. Raises RecipeError for none."""
    what = push.what
    for name in (what, f"{what}/"):
        if name in plan.producer:
            return [name]
    if what in plan.sources and plan.sources[what].kind in ("file", "folder"):
        return [what]
    found = matching(what, plan.producer) if is_glob(what) else []
    if not found:
        from buildsys.recipe.mistakes import suggestion

        raise RecipeError(
            f"there is no artifact '{what}' to push",
            remedy=suggestion(what, plan.producer, "artifacts"),
            location=push.where,
        )
    return found


def items(device: Device, plan: Plan, build: str, toolchains: Mapping[str, str]) -> Iterator[Item]:
    """Everything that `push` means. build: the build folder. toolchains: name -> folder."""
    for push in device.push:
        if push.what.startswith(TOOLCHAIN):
            for path in _of_toolchain(push, toolchains):
                yield Item(push.what, path, push.to, push)
            continue
        for name in _meant(push, plan):
            source = plan.sources.get(name)
            path = source.paths["path"] if source is not None else f"{build}/{name}"
            yield Item(name, path, push.to, push)


def toolchain_roots(
    devices: Sequence[Device], recipe: str, own: Mapping[str, str]
) -> dict[str, str]:
    """Where the toolchains are that `push` names: as the user's file says, else as found."""
    from buildsys.toolchains.definitions import folders_for
    from buildsys.toolchains.finding import find_toolchains

    pushed = [push.what for device in devices for push in device.push]
    named = {what.removeprefix(TOOLCHAIN).partition("/")[0] for what in pushed if TOOLCHAIN in what}
    found = find_toolchains(named - set(own), folders_for(recipe), os.environ).found
    roots = {name: each.fields["root"] for name, each in found.items() if "root" in each.fields}
    return {**roots, **own}


def _of_toolchain(push: Push, toolchains: Mapping[str, str]) -> list[str]:
    name, _, inside = push.what.removeprefix(TOOLCHAIN).partition("/")
    if name not in toolchains:
        raise ToolchainMissing(
            f"where is the toolchain '{name}'?",
            remedy="write its folder into devices.yaml, `toolchains: {" + name + ": FOLDER}`",
            location=push.where,
        )
    root = Path(toolchains[name]).expanduser().resolve()
    found = sorted(root.glob(inside)) if inside else []
    inside_root = [str(each) for each in found if each.resolve().is_relative_to(root)]
    if not inside_root:
        raise ToolchainMissing(f"{name} has no file {inside} ({root})", location=push.where)
    return inside_root


def files_of(things: Iterator[Item], known: HostFiles) -> list[PushFile]:
    """Every file, with its digest. Raises DeviceRefused for names that cannot be, for links and
    whatever else is no file, and for two files with one target."""
    files: dict[str, PushFile] = {}
    for item in things:
        for inside, path in _walk(item):
            target = checked_path(_target(item, inside), item.push.where)
            facts = known.of(path)
            mode = item.push.mode or _mode(path, facts)
            file = PushFile(target, path, mode, item.name, facts)
            if target in files:
                raise DeviceRefused(
                    f"{files[target].path} and {path} would both be {target}",
                    remedy="give one of them another name in `push`",
                    location=item.push.where,
                )
            files[target] = file
    refuse_same({target: file.path for target, file in files.items()})
    return list(files.values())


def _walk(item: Item) -> Iterator[tuple[str, str]]:
    """(path inside, path here) of the files of an artifact; inside is "" for a file."""
    path = item.path.rstrip("/")
    try:
        kind = Path(path).stat().st_mode
    except OSError as error:
        message = f"cannot push {item.name or path}: {error.strerror}"
        raise DeviceRefused(message, location=item.push.where) from error
    if not stat.S_ISDIR(kind):
        yield "", _regular(path, kind, item)
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            whole = Path(folder, name)
            inside = str(whole.relative_to(path))
            yield inside, _regular(str(whole), whole.lstat().st_mode, item)


def _regular(path: str, kind: int, item: Item) -> str:
    if not stat.S_ISREG(kind):
        raise DeviceRefused(f"{path} is no regular file", location=item.push.where)
    return path


def _target(item: Item, inside: str) -> str:
    """Where a file goes: below `to` where that is a folder or a folder is pushed."""
    to = "" if item.to in (".", "./") else item.to
    name = Path(item.path).name
    if inside:
        return f"{to.rstrip('/')}/{inside}" if to else inside
    if not to or to.endswith("/"):
        return f"{to}{name}"
    return to


def _mode(path: str, facts: HostFile) -> int:
    """Programs are executable there even where the host's file is not."""
    runs = facts.program or bool(Path(path).stat().st_mode & stat.S_IXUSR and not facts.machine)
    return 0o755 if runs else 0o644
