"""What a device is: the recipe says what goes there and runs, the user's own file says where.

A recipe is shared, so it names no serial, no host and no user. Those are in
`~/.config/qbuild/devices.yaml` (`$XDG_CONFIG_HOME` is honoured), which may also describe devices
of its own: whole ones, or `like: NAME` for a second one of the kind that the recipe describes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.devices.ssh import Address
from buildsys.errors import Location, RecipeError, UsageError
from buildsys.recipe.json_schema import STRING, any_names, described, table_of
from buildsys.recipe.nodes import Node, Table, follow, plain
from buildsys.recipe.quantities import seconds
from buildsys.recipe.schema import device_schema

if TYPE_CHECKING:
    from buildsys.devices.transport import Transport
    from buildsys.plan.graph import Json, Plan

WHERE = ("serial", "host", "user", "port", "identity", "known_hosts", "adb")
TIMEOUT = 600.0


@dataclass(frozen=True)
class Push:
    """One line of `push`. what: an artifact, a glob, a source, or `toolchain:NAME/PATH`.
    to: a file below the root, or a folder where it ends in "/" or is "."."""

    what: str
    to: str
    mode: int | None
    where: Location | None


@dataclass(frozen=True)
class Run:
    """What is run. timeout: seconds. exit: the code that means success; output: a text that
    must be in what it prints."""

    argv: tuple[str, ...]
    timeout: float
    environment: Mapping[str, str]
    exit: int
    output: str | None


@dataclass(frozen=True)
class Device:
    """A device, complete. invalidates: file there -> what makes it stale. pull: file there ->
    file here. require: fact -> value that it must have. at: where it is (`WHERE`)."""

    name: str
    transport: str
    root: str
    push: tuple[Push, ...]
    invalidates: Mapping[str, tuple[str, ...]]
    run: Run | None
    pull: Mapping[str, str]
    require: Mapping[str, str]
    at: Mapping[str, Json]


def user_file() -> Path:
    """Where the user's own devices are written down."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config, "qbuild", "devices.yaml").expanduser()


def user_schema() -> Json:
    """The JSON Schema of that file."""
    device = device_schema()
    where: dict[str, Json] = {
        "like": described(STRING, "a device of the recipe that this is another one of"),
        "serial": described(STRING, "of an adb device: what `adb devices` calls it"),
        "host": described(STRING, "of a board: its name or address"),
        "user": STRING,
        "port": {"type": "integer", "minimum": 1, "maximum": 65535},
        "identity": described(STRING, "the private key to log in with"),
        "known_hosts": described(STRING, "the file with its host key"),
        "adb": described(STRING, "the adb program to use"),
    }
    one = table_of({**device["properties"], **where})
    return table_of({"devices": any_names(one), "toolchains": any_names(STRING)}, ["devices"])


def read_user_file(path: Path) -> Table | None:
    """The user's file, checked; None where there is none. Raises RecipeError with the place."""
    if not path.is_file():
        return None
    from buildsys.recipe.mistakes import raise_all
    from buildsys.recipe.reading import read_nodes
    from buildsys.recipe.validation import checker

    nodes = read_nodes(str(path))
    raise_all(checker(user_schema())(nodes))
    return nodes


def devices_of(plan: Plan, mine: Table | None) -> dict[str, Device]:
    """Every device that the recipe or the user's file describes."""
    described_here: dict[str, Json] = dict(plan.devices)
    own = mine.entries.get("devices") if mine is not None else None
    if isinstance(own, Table):
        for name, node in own.entries.items():
            described_here[name] = merged(name, plan.devices, plain(node), own.keys[name])
    places = Places(plan, mine)
    return {name: device(name, raw, places) for name, raw in described_here.items()}


def merged(name: str, recipe: Mapping[str, Json], own: Json, where: Location) -> Json:
    """The user's description laid over the recipe's. Raises RecipeError where the user's file
    says anew what the recipe says."""
    own = dict(own or {})
    like = own.pop("like", name)
    base = recipe.get(like)
    if base is None:
        if like != name:
            from buildsys.recipe.mistakes import suggestion

            remedy = suggestion(like, recipe, "devices of the recipe")
            raise RecipeError(f"the recipe has no device '{like}'", remedy=remedy, location=where)
        missing = [key for key in ("transport", "root") if key not in own]
        if missing:
            raise RecipeError(
                f"the recipe does not describe '{name}', and '{missing[0]}' is missing here",
                location=where,
            )
        return own
    both = sorted(set(own) & (set(base) - {"root", "transport"}))
    if both:
        raise RecipeError(
            f"'{both[0]}' of the device '{like}' is the recipe's to say",
            remedy="here only where it is: root, transport, " + ", ".join(WHERE),
            location=where,
        )
    return {**base, **own}


class Places:
    """Where in the files something about a device is written; read only for a message."""

    def __init__(self, plan: Plan, mine: Table | None) -> None:
        self._recipe = plan.recipe
        self._mine = mine
        self._read: Node | None = None

    def of(self, *path: str) -> Location | None:
        """The place of devices.PATH in the user's file, else in the recipe."""
        from buildsys.recipe.reading import read_nodes

        if self._read is None and Path(self._recipe).is_file():
            self._read = read_nodes(self._recipe)
        for root in (self._mine, self._read):
            if root is not None and _has(root, ("devices", *path)):
                return follow(root, ("devices", *path))[1]
        return None


def _has(node: Node, path: Sequence[str]) -> bool:
    for step in path:
        if not isinstance(node, Table) or step not in node.entries:
            return False
        node = node.entries[step]
    return True


def device(name: str, raw: Json, places: Places) -> Device:
    """A description that has passed the schema, as a Device. Raises RecipeError."""
    push = tuple(
        _push(what, value, places.of(name, "push", what))
        for what, value in raw.get("push", {}).items()
    )
    return Device(
        name=name,
        transport=raw["transport"],
        root=raw["root"],
        push=push,
        invalidates={path: tuple(each) for path, each in raw.get("invalidates", {}).items()},
        run=_run(raw["run"], places.of(name, "run")) if raw.get("run") else None,
        pull=dict(raw.get("pull", {})),
        require={fact: str(value) for fact, value in raw.get("require", {}).items()},
        at={key: raw[key] for key in WHERE if key in raw},
    )


def _push(what: str, value: Json, where: Location | None) -> Push:
    if isinstance(value, str):
        return Push(what, value, None, where)
    mode = value.get("mode")
    try:
        return Push(what, value["to"], int(mode, 8) if mode is not None else None, where)
    except ValueError as error:
        message = f"'{mode}' is no file mode: write for example '755'"
        raise RecipeError(message, location=where) from error


def _run(raw: Json, where: Location | None) -> Run:
    expect = raw.get("expect", {})
    try:
        limit = seconds(raw["timeout"]) if "timeout" in raw else TIMEOUT
    except ValueError as error:
        raise RecipeError(str(error), location=where) from error
    return Run(
        argv=tuple(raw["argv"]),
        timeout=limit,
        environment=dict(raw.get("environment", {})),
        exit=expect.get("exit", 0),
        output=expect.get("output"),
    )


def transport_of(device: Device, adb: str | None = None) -> Transport:
    """The way to a device. adb: the program that the command line names."""
    at = device.at
    if device.transport == "adb":
        from buildsys.devices.adb import AdbTransport

        return AdbTransport(at.get("serial"), adb or at.get("adb"))
    if device.transport == "local":
        from buildsys.devices.local import LocalTransport

        return LocalTransport()
    if "host" not in at:
        raise UsageError(
            f"where is the device '{device.name}'?",
            remedy=f"write its host into {user_file()}:\n"
            f"devices:\n  {device.name}: {{host: ..., user: ...}}",
        )
    from buildsys.devices.ssh import SshTransport

    known = ("user", "port", "identity", "known_hosts")
    return SshTransport(Address(at["host"], **{key: at[key] for key in known if key in at}))


def choose(devices: Mapping[str, Device], words: Sequence[str]) -> list[Device]:
    """The devices that a command line means. words: names; "all"; none for the only one."""
    if not devices:
        raise UsageError(
            "no device is described", remedy=f"in the recipe (`devices:`) or in {user_file()}"
        )
    if "all" in words and "all" not in devices:
        return list(devices.values())
    if not words:
        if len(devices) == 1:
            return list(devices.values())
        listed = ", ".join(devices)
        raise UsageError(f"which device? there are {listed}", remedy="--device NAME, or all")
    from buildsys.recipe.mistakes import suggestion

    for word in words:
        if word not in devices:
            remedy = suggestion(word, devices, "devices")
            raise UsageError(f"there is no device '{word}'", remedy=remedy)
    return [devices[word] for word in dict.fromkeys(words)]
