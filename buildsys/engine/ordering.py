"""From a step of the plan to an order for the executor: paths filled in, program worked out."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from buildsys.engine.executor import Order
from buildsys.engine.keeping import kept_folder
from buildsys.engine.key import canonical, device_of, key_digest
from buildsys.rules.spec import Input, StepContext

if TYPE_CHECKING:
    from buildsys.engine.blueprint import RuleFacts
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.schedule import Claim
    from buildsys.plan.graph import Json, Plan, Ref, Step
    from buildsys.rules.spec import Command


def make_order(
    step: Step,
    plan: Plan,
    facts: RuleFacts,
    folder: BuildFolder,
    staging: str,
    parts: Mapping[str, Json],
    template: Callable[[str], str],
    toolchain: Mapping[str, str] | None = None,
    claim: Claim | None = None,
    priority: float = 0.0,
    elsewhere: bool = False,
) -> Order:
    """The order that makes `step` in `staging`. parts: of its key, for the inputs' digests;
    toolchain: what the step is told of its own; elsewhere: it runs where programs, toolchains
    and kept folders are not those of this machine.

    Imports the rule; where it runs a program, asks it which. Raises StepError.
    """
    context = step_context(step, plan, facts, folder, staging, parts, template)
    context["toolchain"] = dict(toolchain or {})
    argv: tuple[str, ...] = ()
    environment: Mapping[str, str] = dict(step.environment)
    if not elsewhere:
        if facts.resumable:
            context["kept"] = kept_folder(folder, step.name, key_digest(parts))
        argv, environment = program_of(facts.module, context, environment)
    worker = "fresh" if device_of(step) != "cpu" else facts.worker
    return Order(
        id=step.name,
        module="" if argv else facts.module,
        argv=argv,
        context=context,
        environment=environment,
        staging=staging,
        log=folder.log(step.name),
        worker=worker,  # type: ignore[arg-type]  # a rule's worker is one of the three words
        threads=step.threads,
        timeout=step.timeout,
        memory_limit=claim.limit if claim is not None else None,
        claim=claim,
        priority=priority,
        parts=parts,
    )


def program_of(
    module: str, context: Mapping[str, Json], environment: Mapping[str, str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """The program that a rule runs for a step and its environment; none where the rule has
    `make`. Raises StepError."""
    rule = sys.modules.get(module) or importlib.import_module(module)
    if not hasattr(rule, "command"):
        return (), environment
    asked: Command = rule.command(in_process(context))
    return asked.argv, dict(asked.environment)


def step_context(
    step: Step,
    plan: Plan,
    facts: RuleFacts,
    folder: BuildFolder,
    staging: str,
    parts: Mapping[str, Json],
    template: Callable[[str], str],
) -> dict[str, Json]:
    """The fields of `StepContext` as JSON."""
    options = {
        name: template(str(value)) if name in facts.templates else value
        for name, value in step.options.items()
    }
    inputs = {
        name: [
            _input(ref, plan, folder, dict(parts["inputs"][name]))
            for ref in given
            if not _is_skipped(ref, parts["inputs"][name])
        ]
        for name, given in step.inputs.items()
    }
    return {
        "name": step.name,
        "inputs": inputs,
        "options": options,
        "outputs": {name: f"{staging}/{path.rstrip('/')}" for name, path in step.outputs.items()},
        "threads": step.threads,
        "device": device_of(step),
        "environment": dict(step.environment),
        "memory": step.resources.get("memory"),
        "toolchain": {},
    }


def _is_skipped(ref: Ref, items: Json) -> bool:
    return ref.kind == "artifact" and [ref.name, None] in items


def _input(
    ref: Ref, plan: Plan, folder: BuildFolder, digests: Mapping[str, str]
) -> dict[str, Json]:
    if ref.kind == "artifact":
        path = f"{folder.root}/{ref.name.rstrip('/')}"
        digest = digests[ref.name]
        return {"name": ref.name, "kind": ref.kind, "paths": {"path": path}, "digest": digest}
    source = plan.sources[ref.name]
    own = [[k, v] for k, v in digests.items() if k == ref.name or k.startswith(f"{ref.name}:")]
    digest = str(own[0][1]) if len(own) == 1 else blake3(canonical(own).encode()).hexdigest()
    return {
        "name": source.name,
        "kind": source.kind,
        "paths": dict(source.paths),
        "digest": digest,
        "options": dict(source.options),
    }


@lru_cache(4096)
def _path(text: str) -> Path:
    """A path; most artifacts are read by several steps, and taking a path apart is slow."""
    return Path(text)


def in_process(context: Mapping[str, Json]) -> StepContext:
    """The context as a value, for `command(step)`, which only looks at it."""
    given = {
        name: tuple(
            Input(
                each["name"],
                each["kind"],
                {role: _path(path) for role, path in each["paths"].items()},
                each["digest"],
                each.get("options", {}),
            )
            for each in items
        )
        for name, items in context["inputs"].items()
    }
    return StepContext(
        name=context["name"],
        inputs=given,
        options=context["options"],
        outputs={name: Path(path) for name, path in context["outputs"].items()},
        threads=context["threads"],
        device=context["device"],
        environment=context["environment"],
        toolchain=context["toolchain"],
        progress=lambda done, total, unit: None,
        note=lambda key, value: None,
        warn=lambda text: None,
        log=logging.getLogger("qbuild.command"),
    )
