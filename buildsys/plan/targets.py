"""Which steps the words of a command line mean, and what hangs on what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from buildsys.errors import UsageError

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Step

TAG = "tag:"


def targets(plan: Plan, words: Sequence[str]) -> tuple[str, ...]:
    """The steps that make what is named, in the plan's order; every step for no words.

    A word is an output path (a folder's with or without its "/"), a glob over them, or
    `tag:NAME`. Raises UsageError with the nearest name for one that means nothing.
    """
    if not words:
        return tuple(plan.steps)
    wanted = {step for word in words for step in steps_of(plan, word)}
    return tuple(name for name in plan.steps if name in wanted)


def steps_of(plan: Plan, word: str) -> list[str]:
    from buildsys.plan.globs import is_glob, matching

    if word in plan.producer:
        return [plan.producer[word]]
    if f"{word}/" in plan.producer:
        return [plan.producer[f"{word}/"]]
    if word.startswith(TAG):
        found = [name for name, step in plan.steps.items() if word.removeprefix(TAG) in step.tags]
    elif is_glob(word):
        found = [plan.producer[path] for path in matching(word, plan.producer)]
    else:
        found = []
    if not found:
        raise unknown_target(plan, word)
    return found


def unknown_target(plan: Plan, word: str) -> UsageError:
    from buildsys.recipe.mistakes import suggestion

    if word in plan.sources:
        return UsageError(f"'{word}' is a source: qbuild reads it and does not make it")
    if word.startswith(TAG):
        tags = {f"{TAG}{tag}" for step in plan.steps.values() for tag in step.tags}
        return UsageError(
            f"no artifact has the tag '{word.removeprefix(TAG)}'",
            remedy=suggestion(word, tags, "tags"),
        )
    known = list(plan.producer)
    return UsageError(f"there is no artifact '{word}'", remedy=suggestion(word, known, "artifacts"))


def steps_read(plan: Plan, step: Step) -> tuple[str, ...]:
    """The steps whose outputs `step` reads, each once, in the order of its inputs."""
    artifacts = (ref for refs in step.inputs.values() for ref in refs if ref.kind == "artifact")
    return tuple(dict.fromkeys(plan.producer[ref.name] for ref in artifacts))


def upstream(plan: Plan, names: Iterable[str]) -> tuple[str, ...]:
    """These steps and everything that they need, in the plan's order."""
    wanted = set(names)
    # Steps come after what they need: one walk from the end finds it all.
    for name, step in reversed(list(plan.steps.items())):
        if name in wanted:
            wanted.update(steps_read(plan, step))
    return tuple(name for name in plan.steps if name in wanted)


def downstream(plan: Plan, names: Iterable[str]) -> tuple[str, ...]:
    """These steps and everything that needs them, in the plan's order."""
    wanted = set(names)
    for name, step in plan.steps.items():
        if name not in wanted and not wanted.isdisjoint(steps_read(plan, step)):
            wanted.add(name)
    return tuple(name for name in plan.steps if name in wanted)
