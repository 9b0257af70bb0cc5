"""Runs a rule as the engine does: checked options with their defaults, a fresh staging folder."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from buildsys.rules import find_rule, rule_modules
from buildsys.rules.spec import Input, Rule, StepContext

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

Given = Path | Input | Sequence[Path | Input]


@dataclass
class Made:
    """What a step left: its outputs, notes, warnings and the progress it told."""

    context: StepContext
    notes: dict[str, Any]
    warnings: list[str]
    progress: list[tuple[float, float, str]]

    @property
    def out(self) -> Path:
        return self.context.out

    def output(self, name: str) -> Path:
        return self.context.outputs[name]


Runner = Callable[..., Made]


@pytest.fixture
def step(tmp_path: Path) -> Runner:
    """step(rule, name, inputs, options): the context of a step that has not run yet."""
    count = 0

    def prepare(rule_name: str, name: str, *given: Any, **changes: Any) -> Made:
        nonlocal count
        count += 1
        return prepare_step(tmp_path / f"staging-{count}", rule_name, name, *given, **changes)

    return prepare


def prepare_step(
    staging: Path,
    rule_name: str,
    name: str,
    inputs: Mapping[str, Given] | None = None,
    options: Mapping[str, Json] | None = None,
    **changes: Any,
) -> Made:
    """The context of a step in a folder that does not exist yet."""
    rule = find_rule(rule_name)
    staging.mkdir()
    notes: dict[str, Any] = {}
    warnings: list[str] = []
    progress: list[tuple[float, float, str]] = []
    context = StepContext(
        name=name,
        inputs={key: as_inputs(key, given) for key, given in (inputs or {}).items()},
        options=complete(rule, options or {}),
        outputs=outputs_of(rule, name, staging, changes.get("outputs", {})),
        threads=rule.threads,
        device="cpu",
        environment=changes.get("environment", {}),
        toolchain=changes.get("toolchain", {}),
        progress=lambda done, total, unit: progress.append((done, total, unit)),
        note=lambda key, value: notes.__setitem__(key, copy.deepcopy(value)),
        warn=warnings.append,
        log=logging.getLogger("test"),
    )
    return Made(context, notes, warnings, progress)


@pytest.fixture
def make(step: Runner) -> Runner:
    """make(rule, name, inputs, options): runs the step here and returns what it left."""

    def run(rule_name: str, *given: Any, **changes: Any) -> Made:
        return make_step(rule_name, step(rule_name, *given, **changes))

    return run


def make_step(rule_name: str, made: Made) -> Made:
    """Run a prepared step."""
    importlib.import_module(rule_modules()[rule_name]).make(made.context)
    return made


@pytest.fixture
def golden(golden_folder: Path) -> Path:
    """The folder of golden data; the test is skipped where it is not."""
    return golden_folder


def as_inputs(name: str, given: Given) -> tuple[Input, ...]:
    items = [given] if isinstance(given, Path | Input) else list(given)
    return tuple(
        item if isinstance(item, Input) else Input(item.name, "artifact", {"path": item}, "digest")
        for item in items
    )


def complete(rule: Rule, options: Mapping[str, Json]) -> dict[str, Json]:
    """The options with defaults, refused as the recipe would refuse them."""
    found = {key: schema["default"] for key, schema in rule.options.items() if "default" in schema}
    found.update(options)
    for key, value in found.items():
        if key in rule.options:
            jsonschema.validate(value, rule.options[key])
        elif not rule.open_options:
            pytest.fail(f"rule {rule.name} has no option {key!r}")
    missing = [key for key in rule.options if key not in found]
    if missing:
        pytest.fail(f"rule {rule.name} needs the options {missing}")
    return found


def outputs_of(rule: Rule, name: str, staging: Path, named: Mapping[str, str]) -> dict[str, Path]:
    """The main output, those with a default name, and those that the recipe names."""
    outputs = {"out": staging / name, **{key: staging / path for key, path in named.items()}}
    for key, spec in rule.outputs.items():
        if spec.default is not None:
            outputs[key] = staging / spec.default
    for path in outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if rule.folder:
        outputs["out"].mkdir()
    return outputs
