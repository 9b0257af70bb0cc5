"""Recipe -> Plan: names resolved, options complete, steps in order. Touches no file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from buildsys.errors import Location, RecipeError
from buildsys.plan.computing import device_mistakes, takes_device, with_device
from buildsys.plan.graph import Gate, Plan, Ref, Source, Step
from buildsys.plan.order import find_circle, topological
from buildsys.plan.outputs import Output, check_name, check_together, folded
from buildsys.plan.references import Names, resolve_inputs
from buildsys.recipe.mistakes import raise_all, suggestion
from buildsys.recipe.nodes import plain

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.recipe.recipe import ArtifactEntry, Recipe
    from buildsys.rules.spec import Problem, Rule


def make_plan(recipe: Recipe, rules: Mapping[str, Rule], *, cuda: bool = False) -> Plan:
    """The graph of a recipe. cuda: what `device: auto` may take.

    Raises RecipeError (RecipeMistakes for several) for names that are taken twice, lead out
    of the build folder or do not exist, inputs of the wrong kind, circles, and everything
    that the rules' own checks find.
    """
    recipe = leave_out_what_is_off(recipe)
    outputs = {entry.name: outputs_of(entry, rules[entry.rule]) for entry in recipe.artifacts}
    everything = [output for each in outputs.values() for output in each.values()]
    check_outputs(recipe, rules, everything)
    names = Names(recipe.sources, {output.path: output.step for output in everything}, recipe.off)
    steps = resolve_steps(recipe, rules, outputs, names, cuda)
    needs = {name: producers(step, names.producer) for name, step in steps.items()}
    refuse_circle(steps, needs, names.producer, recipe)
    plan = Plan(
        name=recipe.name,
        recipe=recipe.path,
        defines=recipe.defines,
        sources={
            name: Source(
                name,
                entry.kind,
                entry.paths,
                entry.options,
                entry.places["path"],
                {part: place for part, place in entry.places.items() if part != "path"},
            )
            for name, entry in recipe.sources.items()
        },
        steps={name: steps[name] for name in topological(needs)},
        producer=names.producer,
        gates=tuple(resolve_gates(recipe, names)),
        devices=recipe.devices,
    )
    raise_all(rule_problems(plan, recipe, rules))
    return plan


def leave_out_what_is_off(recipe: Recipe) -> Recipe:
    """An optional artifact goes with the source or artifact that it needs and that is off."""
    off = dict(recipe.off)
    artifacts = list(recipe.artifacts)
    while True:
        gone = [entry for entry in artifacts if entry.optional and needs_any(entry, off)]
        if not gone:
            return replace(recipe, artifacts=tuple(artifacts), off=off)
        off |= {entry.name: entry.where for entry in gone}
        off |= {path: place for entry in gone for path, place in entry.outputs.values()}
        artifacts = [entry for entry in artifacts if entry.name not in off]


def needs_any(entry: ArtifactEntry, off: Mapping[str, Location]) -> bool:
    return any(
        wish.text in off and not wish.optional
        for given in entry.inputs.values()
        for wish in given.wishes
    )


def outputs_of(entry: ArtifactEntry, rule: Rule) -> dict[str, Output]:
    """Every output of an artifact: "out", then the further ones that are named or default.

    A default path lies beside the main output.
    """
    found = {"out": Output(entry.name, entry.name, entry.where)}
    folder = entry.name.removesuffix("/").rpartition("/")[0]
    for name, spec in rule.outputs.items():
        if name not in entry.outputs and spec.default is not None:
            path = f"{folder}/{spec.default}" if folder else spec.default
            found[name] = Output(path, entry.name, entry.where)
    for name, (path, where) in entry.outputs.items():
        found[name] = Output(path, entry.name, where)
    return found


def check_outputs(recipe: Recipe, rules: Mapping[str, Rule], everything: list[Output]) -> None:
    errors = [error for output in everything for error in check_name(output.path, output.where)]
    raise_all(errors)
    errors += check_together(everything)
    sources = {folded(name): entry for name, entry in recipe.sources.items()}
    for output in everything:
        source = sources.get(folded(output.path.removesuffix("/")))
        if source is not None:
            errors.append(
                RecipeError(
                    f"'{output.path}' is the name of a source already ({source.where})",
                    remedy="sources and artifacts share one namespace: rename one of them",
                    location=output.where,
                )
            )
    for entry in recipe.artifacts:
        errors += folder_mistakes(entry, rules[entry.rule])
    raise_all(errors)


def folder_mistakes(entry: ArtifactEntry, rule: Rule) -> Iterator[RecipeError]:
    is_folder = entry.name.endswith("/")
    if rule.folder and not is_folder:
        yield RecipeError(
            f"rule '{rule.name}' makes a folder",
            remedy=f"end its name with a slash: '{entry.name}/'",
            location=entry.where,
        )
    # A program (rule `command`) may make either; it is known by its inputs of any name.
    if is_folder and not rule.folder and not rule.open_inputs:
        yield RecipeError(
            f"rule '{rule.name}' makes a file",
            remedy=f"write its name without the slash: '{entry.name.rstrip('/')}'",
            location=entry.where,
        )


def resolve_steps(
    recipe: Recipe,
    rules: Mapping[str, Rule],
    outputs: Mapping[str, Mapping[str, Output]],
    names: Names,
    cuda: bool,
) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    errors: list[RecipeError] = []
    for entry in recipe.artifacts:
        rule = rules[entry.rule]
        inputs, mistakes = resolve_inputs(entry, rule, names)
        errors += mistakes
        options, resources = complete_options(entry, rule), dict(entry.resources)
        if takes_device(rule):
            errors += device_mistakes(entry, options)
            options, resources = with_device(options, resources, cuda)
        usual = rule.toolchain_for(options) if rule.toolchain_for else rule.toolchain
        steps[entry.name] = Step(
            name=entry.name,
            rule=entry.rule,
            inputs=inputs,
            options=options,
            outputs={name: output.path for name, output in outputs[entry.name].items()},
            optional=entry.optional,
            temporary=entry.temporary,
            tags=entry.tags,
            threads=rule.threads if entry.threads is None else entry.threads,
            resources=resources,
            timeout=entry.timeout,
            toolchain=entry.toolchain or usual,
            environment=entry.environment,
            where=entry.where,
        )
    raise_all(errors)
    return steps


def complete_options(entry: ArtifactEntry, rule: Rule) -> dict[str, Json]:
    """The options as given, and the rule's defaults for the others, in the rule's order."""
    given = plain(entry.options)
    complete = {
        name: given[name] if name in given else copy.deepcopy(schema.get("default"))
        for name, schema in rule.options.items()
    }
    return {**complete, **given}


def producers(step: Step, producer: Mapping[str, str]) -> tuple[str, ...]:
    """The steps whose outputs this one reads, each once, in order."""
    artifacts = (ref for refs in step.inputs.values() for ref in refs if ref.kind == "artifact")
    return tuple(dict.fromkeys(producer[ref.name] for ref in artifacts))


def refuse_circle(
    steps: Mapping[str, Step],
    needs: Mapping[str, tuple[str, ...]],
    producer: Mapping[str, str],
    recipe: Recipe,
) -> None:
    circle = find_circle(needs)
    if not circle:
        return
    # Begin with the artifact that comes first in the recipe, at the input that closes it.
    first = min(circle, key=list(steps).index)
    at = circle.index(first)
    circle = [*circle[at:], *circle[:at], first]
    entry = next(entry for entry in recipe.artifacts if entry.name == first)
    where = entry.where
    for name, refs in steps[first].inputs.items():
        if any(leads_to(ref, circle[1], producer) for ref in refs):
            where = entry.inputs[name].wishes[0].where
            break
    raise RecipeError(
        f"artifacts need each other in a circle: {' -> '.join(circle)}", location=where
    )


def leads_to(ref: Ref, step: str, producer: Mapping[str, str]) -> bool:
    return ref.kind == "artifact" and producer[ref.name] == step


def resolve_gates(recipe: Recipe, names: Names) -> Iterator[Gate]:
    """The gates on artifacts that are on."""
    for gate in recipe.gates:
        if gate.artifact in names.producer:
            yield Gate(gate.artifact, gate.figure, gate.limit, gate.where)
        elif gate.artifact not in recipe.off:
            raise RecipeError(
                f"there is no artifact '{gate.artifact}' to put a gate on",
                remedy=suggestion(gate.artifact, names.producer, "artifacts"),
                location=gate.where,
            )


def rule_problems(plan: Plan, recipe: Recipe, rules: Mapping[str, Rule]) -> Iterator[RecipeError]:
    """What the rules themselves find wrong, at the option or input that they name."""
    for entry in recipe.artifacts:
        check = rules[entry.rule].check
        for problem in check(plan.steps[entry.name], plan) if check is not None else ():
            yield RecipeError(
                problem.message, remedy=problem.remedy, location=problem_place(problem, entry)
            )


def problem_place(problem: Problem, entry: ArtifactEntry) -> Location:
    if problem.option is not None and problem.option in entry.options.entries:
        value = entry.options.entries[problem.option]
        return value.where
    if problem.input is not None and problem.input in entry.inputs:
        return entry.inputs[problem.input].wishes[0].where
    return entry.where
