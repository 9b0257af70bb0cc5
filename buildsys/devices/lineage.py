"""Do the files that belong together come from one rotation, and have the gates been passed?

Neither shows in the files: a model whose parts were rotated differently loads, runs and talks
nonsense. The build's journal knows what each artifact was made from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.devices.errors import DeviceRefused

if TYPE_CHECKING:
    from buildsys.devices.payload import PushFile
    from buildsys.plan.graph import Json, Plan

ROTATION = "rotation"
METADATA = ("qbuild.rotation", ROTATION)
HEAD = 100 << 20


def check_rotations(
    plan: Plan, done: Mapping[str, Json], artifacts: Collection[str], files: Collection[PushFile]
) -> None:
    """Raises DeviceRefused where two of what is pushed were made with different rotations.

    done: step -> its last journal line.
    """
    found: dict[str, list[str]] = {}
    for name in artifacts:
        for digest in rotations(plan, done, plan.producer[name]):
            found.setdefault(digest, []).append(name)
    for file in files:
        written = written_rotation(file.path)
        if written:
            found.setdefault(written, []).append(file.target)
    if len(found) > 1:
        listed = "\n  ".join(
            f"{digest[:12]}: {', '.join(dict.fromkeys(names))}" for digest, names in found.items()
        )
        raise DeviceRefused(
            f"these were made with different rotations:\n  {listed}",
            remedy="build them with one rotation (`qbuild why NAME` says what is stale)",
        )


def rotations(plan: Plan, done: Mapping[str, Json], step: str) -> set[str]:
    """Digests of every rotation that a step, or anything it was made from, was given."""
    found: set[str] = set()
    waiting, seen = [step], {step}
    while waiting:
        name = waiting.pop()
        line = done.get(name)
        inputs = line["parts"].get("inputs", {}) if line is not None else {}
        found |= {entry[1] for entry in inputs.get(ROTATION, ()) if entry[1]}
        for refs in plan.steps[name].inputs.values():
            for ref in refs:
                maker = plan.producer.get(ref.name) if ref.kind == "artifact" else None
                if maker is not None and maker not in seen:
                    seen.add(maker)
                    waiting.append(maker)
    return found


def written_rotation(path: str) -> str:
    """The rotation that a .safetensors file or a config.json says it was made with; "" for none."""
    if path.endswith("config.json"):
        return _rotation_of_config(Path(path))
    if not path.endswith(".safetensors"):
        return ""
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > HEAD:
            return ""
        try:
            metadata = json.loads(file.read(size)).get("__metadata__", {})
        except (ValueError, AttributeError):
            return ""
    values = (metadata.get(key, "") for key in METADATA)
    return next((value for value in values if value and value != "none"), "")


def _rotation_of_config(path: Path) -> str:
    """What rule mobilint-config wrote down."""
    try:
        content = json.loads(path.read_bytes())
        written = content["qbuild"][ROTATION]
    except (ValueError, KeyError, TypeError):
        return ""
    return written if isinstance(written, str) else ""
