"""What a rule is, and what its code gets to work with.

A rule is one module of this package with two names in it: `RULE`, a `Rule` value, cheap to
import; and either `make(step)`, which runs in a worker process and imports what it needs
(torch, transformers) inside the function, or `command(step)`, which returns the program to
run and touches nothing. Its name is the module's with "-" for "_".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from buildsys.errors import StepError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json, Plan, Step

ModelPart = Literal["config", "weights", "tokenizer", "processor"]
# What a rule's option `device` may be; `auto` is settled when the plan is made.
DEVICES = ("cpu", "cuda", "auto")
ANY_FILE = ("artifact", "file")
ANY_FOLDER = ("artifact", "folder")


@dataclass(frozen=True)
class InputSpec:
    """One named input. kinds: "artifact" or a source's kind. parts: which parts of a model
    source the rule reads, so that an edit to anything else in the folder is no change."""

    doc: str
    kinds: tuple[str, ...] = ANY_FILE
    required: bool = True
    many: bool = False
    parts: tuple[ModelPart, ...] = ()


@dataclass(frozen=True)
class OutputSpec:
    """A further named output and the path it has when the recipe gives none (None: not made)."""

    doc: str
    default: str | None


class Memory(NamedTuple):
    """What a step holds at its peak beyond its interpreter, as long as no run has told: so many
    times the largest tensor that it reads, and so many times all of them, as float32. An upper
    bound is better than a close figure: it decides what runs beside it. The default is for rules
    that stream (rotation, conversion, quantization), measured by `bench/memory.py`."""

    largest: float = 0.5
    whole: float = 0.0


STREAMING = Memory()


@dataclass(frozen=True)
class Problem:
    """Something that a rule finds wrong in the plan before anything runs: `option` or `input`
    says which line of the recipe to point at."""

    message: str
    remedy: str | None = None
    option: str | None = None
    input: str | None = None


@dataclass(frozen=True)
class Rule:
    """How one kind of artifact is made.

    inputs, outputs: by name; the main output is the artifact itself.
    options: option name -> JSON Schema (with "default" and "description"); an option without
        a default is required. `open_options` and `open_inputs` allow further ones, of any
        name (rule `command` takes any inputs; rule `script` any variables).
    distributions: Python distributions whose versions are part of the action key.
    worker: "python" forks the warm worker that has torch imported; "light" one that has not.
    threads: fixed, because sums of floats depend on it.
    resumable: the step gets `StepContext.kept`, a folder that outlives a kill.
    check: looks at the step in its plan before anything runs; touches no file.
    memory: what a step holds, by the tensors that it reads.
    toolchain: that a step needs, or several, joined by "+": all must be there. toolchain_for:
        where it depends on the step's options; `toolchain` is the usual one then.
    templates: option names that hold a template's file name; its bytes are part of the key.
    rendered: option names in which the rule fills in `${in.NAME}`, `${out}` and the like when
        the step runs; the recipe leaves those, and `$${`, alone there.
    """

    name: str
    doc: str
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    outputs: Mapping[str, OutputSpec] = field(default_factory=dict)
    distributions: tuple[str, ...] = ()
    toolchain: str | None = None
    worker: Literal["python", "light"] = "light"
    threads: int = 1
    folder: bool = False
    open_options: bool = False
    open_inputs: bool = False
    templates: tuple[str, ...] = ()
    rendered: tuple[str, ...] = ()
    float_sums: bool = False
    resumable: bool = False
    check: Callable[[Step, Plan], Iterable[Problem]] | None = None
    toolchain_for: Callable[[Mapping[str, Json]], str] | None = None
    memory: Memory = STREAMING


@dataclass(frozen=True)
class Input:
    """One thing that a running step reads.

    kind: "artifact", or a source's kind. paths: "path" and, for images, "prompts" and
    "answers" where given. options: a source's own (samples, tokens, seed, size, field).
    """

    name: str
    kind: str
    paths: Mapping[str, Path]
    digest: str
    options: Mapping[str, Json] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.paths["path"]


@dataclass(frozen=True)
class StepContext:
    """What `make(step)` gets. Everything it may read or write is here.

    outputs: "out" and the further named outputs -> paths in a fresh staging folder, which is
        also the working folder. A rule writes those and nothing else.
    progress: progress(done, total, unit), as often as the rule likes.
    kept: for a resumable rule, a folder on the file system of the outputs that holds what an
        earlier run with the same key left when it was killed; None where nothing is kept.
    memory: bytes that the recipe reserves for the step; None where it reserves none.
    note: note(key, value) adds to the artifact's metadata in the journal (each fallback used,
        figures); values are JSON. warn: a line for the person, also kept in the journal.
    """

    name: str
    inputs: Mapping[str, tuple[Input, ...]]
    options: Mapping[str, Json]
    outputs: Mapping[str, Path]
    threads: int
    device: str
    environment: Mapping[str, str]
    toolchain: Mapping[str, str]
    progress: Callable[[float, float, str], None]
    note: Callable[[str, Json], None]
    warn: Callable[[str], None]
    log: logging.Logger
    kept: Path | None = None
    memory: int | None = None

    @property
    def out(self) -> Path:
        return self.outputs["out"]

    def one(self, name: str) -> Input:
        """The input `name`; StepError if the recipe gives none."""
        given = self.inputs.get(name, ())
        if not given:
            raise StepError(f"{self.name}: input '{name}' is missing")
        return given[0]

    def maybe(self, name: str) -> Input | None:
        """The input `name`, or None where an optional one is not given."""
        given = self.inputs.get(name, ())
        return given[0] if given else None


@dataclass(frozen=True)
class Command:
    """A program to run as the step: an argument list (never a shell string) and its whole
    environment. It runs in the staging folder with no standard input."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
