"""The graph of a plan as text, as Graphviz dot and as Mermaid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from buildsys.plan.targets import steps_read

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Step

WIDTH = 80


def tree(plan: Plan, steps: Sequence[str]) -> Iterator[str]:
    """From what nothing needs down to the sources; what was shown before is not unfolded
    again. Lines fit 80 columns where names allow."""
    chosen = set(steps)
    needed = {each for name in steps for each in steps_read(plan, plan.steps[name])}
    shown: set[str] = set()
    for name in steps:
        if name in needed:
            continue
        yield label(plan.steps[name])
        yield from branches(plan, name, chosen, shown)


def branches(plan: Plan, root: str, chosen: set[str], shown: set[str]) -> Iterator[str]:
    """What hangs on `root`, drawn without recursion: a chain may be thousands deep."""
    shown.add(root)
    waiting = [("", children(plan, root))]
    while waiting:
        margin, names = waiting[-1]
        if not names:
            waiting.pop()
            continue
        name = names.pop(0)
        elbow, rail = ("├─ ", "│  ") if names else ("└─ ", "   ")
        step = plan.steps.get(name)
        if step is None:
            yield f"{margin}{elbow}{name} ({plan.sources[name].kind} source)"
        elif name in shown:
            dots = " ..." if children(plan, name) else ""
            yield f"{margin}{elbow}{name}{dots}"
        else:
            yield fit(f"{margin}{elbow}", label(step))
            shown.add(name)
            waiting.append((margin + rail, children(plan, name)))


def children(plan: Plan, name: str) -> list[str]:
    """Steps and sources that a step reads, in the order of its inputs."""
    refs = (ref for each in plan.steps[name].inputs.values() for ref in each)
    names = (ref.name if ref.kind == "source" else plan.producer[ref.name] for ref in refs)
    return list(dict.fromkeys(names))


def label(step: Step) -> str:
    others = [path for name, path in step.outputs.items() if name != "out"]
    more = f" + {', '.join(others)}" if others else ""
    marks = [mark for mark in ("optional", "temporary") if getattr(step, mark)]
    marks += [f"tag:{tag}" for tag in step.tags]
    return f"{step.name}{more} [{step.rule}]" + (f" {' '.join(marks)}" if marks else "")


def fit(margin: str, text: str) -> str:
    room = WIDTH - len(margin)
    return margin + (text if len(text) <= room else text[: max(room - 3, 10)] + "...")


def dot(plan: Plan, steps: Sequence[str]) -> Iterator[str]:
    """Graphviz: `qbuild graph --format dot | dot -Tsvg`."""
    yield f"digraph {quoted(plan.name)} {{"
    yield "  rankdir=LR;"
    yield '  node [fontname="sans-serif", shape=box];'
    for name in sources_of(plan, steps):
        yield f"  {quoted('source ' + name)} [label={quoted(name)}, shape=ellipse];"
    for name in steps:
        style = ", style=dashed" if plan.steps[name].optional else ""
        text = quoted(name + "\n" + plan.steps[name].rule)
        yield f"  {quoted(name)} [label={text}{style}];"
    for before, name, optional in edges(plan, steps):
        style = " [style=dashed]" if optional else ""
        yield f"  {quoted(before)} -> {quoted(name)}{style};"
    yield "}"


def quoted(text: str) -> str:
    """A dot string: JSON's escapes of quotes, backslashes and line ends are dot's too."""
    return json.dumps(text, ensure_ascii=False)


def mermaid(plan: Plan, steps: Sequence[str]) -> Iterator[str]:
    """Mermaid, which GitHub and GitLab draw in a ```mermaid block."""
    yield "flowchart LR"
    ids: dict[str, str] = {}
    for name in sources_of(plan, steps):
        ids[f"source {name}"] = f"s{len(ids)}"
        yield f"  {ids[f'source {name}']}([{mermaid_text(name)}])"
    for name in steps:
        ids[name] = f"n{len(ids)}"
        yield f"  {ids[name]}[{mermaid_text(name)}]"
    for before, name, optional in edges(plan, steps):
        yield f"  {ids[before]} {'-.->' if optional else '-->'} {ids[name]}"


def mermaid_text(text: str) -> str:
    escaped = "".join(
        c if c.isalnum() or c in " ./_-" or ord(c) > 127 else f"#{ord(c)};" for c in text
    )
    return f'"{escaped}"'


def sources_of(plan: Plan, steps: Sequence[str]) -> list[str]:
    refs = (ref for name in steps for each in plan.steps[name].inputs.values() for ref in each)
    return list(dict.fromkeys(ref.name for ref in refs if ref.kind == "source"))


def edges(plan: Plan, steps: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(what is read, by which step, may it be missing), each once; sources as "source NAME"."""
    for name in steps:
        seen: dict[str, bool] = {}
        for refs in plan.steps[name].inputs.values():
            for ref in refs:
                source = ref.kind == "source"
                before = f"source {ref.name}" if source else plan.producer[ref.name]
                seen[before] = ref.optional and seen.get(before, True)
        for before, optional in seen.items():
            yield before, name, optional
