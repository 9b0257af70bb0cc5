"""How much memory a step will hold, guessed from the sizes of the tensors that it reads.

Only asked of steps that never ran and of which the recipe says nothing. Of safetensors files the
header is read; of every other file its size stands for that of its tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine.digest import names_of

if TYPE_CHECKING:
    from buildsys.engine.blueprint import RuleFacts
    from buildsys.plan.graph import Json, Plan, Step

MIB = 1 << 20
INTERPRETER = {"light": 48 * MIB, "python": 400 * MIB}  # with numpy, or with torch and its caches
FLOAT32 = 4
LENGTH = 8  # bytes of a safetensors file that hold the length of its header
LONGEST_HEADER = 100 << 20


class Tensors(NamedTuple):
    """Bytes as float32: of the largest tensor, and of all."""

    largest: int = 0
    whole: int = 0

    def plus(self, other: Tensors) -> Tensors:
        return Tensors(max(self.largest, other.largest), self.whole + other.whole)


def estimate(step: Step, plan: Plan, facts: RuleFacts, folder: str) -> int:
    """Bytes; 0 for a program, of which nothing is known. folder: the build folder."""
    largest, whole = facts.memory
    if step.rule == "command":
        return 0
    read = Tensors()
    for path in _files(step, plan, folder):
        read = read.plus(tensors_in(path))
    return int(INTERPRETER[facts.worker] + largest * read.largest + whole * read.whole)


def tensors_in(path: str) -> Tensors:
    """What is in one file; nothing where it cannot be read."""
    try:
        if path.endswith(".safetensors"):
            return _by_header(path)
        size = os.path.getsize(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Tensors()  # damaged: the step will say it better
    return Tensors(0, size)


def _by_header(path: str) -> Tensors:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > LONGEST_HEADER:
            raise ValueError("no header is so long")
        header: dict[str, Json] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    sizes = [math.prod(each["shape"]) * FLOAT32 for each in header.values()]
    return Tensors(max(sizes, default=0), sum(sizes))


def _files(step: Step, plan: Plan, folder: str) -> Iterator[str]:
    """The files that may hold tensors among what a step reads."""
    for given in step.inputs.values():
        for ref in given:
            if ref.kind == "artifact":
                yield from _below(f"{folder}/{ref.name}".rstrip("/"))
            elif plan.sources[ref.name].kind in ("model", "file"):
                yield from _below(plan.sources[ref.name].paths["path"])


def _below(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for name in names_of("weights", sorted(os.listdir(path))):
        yield f"{path}/{name}"
