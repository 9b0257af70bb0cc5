"""A project to break: a random graph of real steps, every kind of output among them.

A step writes half of what it makes, waits, and writes the rest, so that whoever kills it finds
half a file. Its bytes follow from its inputs alone, and never from how long anything took.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bench.graphs import Node

RECIPE = "faults.yaml"
SOURCES = ("src0", "src1")
LONGEST = 0.06  # seconds that a step waits in the middle
LARGE = 1_300_000  # bytes: from 1 MiB on the store links, and no longer copies
TEMPLATE = "#!/bin/sh\necho {{ word }}\n"

# $1: seconds, $2: the output; then the inputs. No pipes: sh does not see who dies in one.
BEGIN = (
    "set -e; d=$1; o=$2; shift 2; "
    'for f; do if [ -d "$f" ]; then cat "$f/f" "$f/sub/g"; else cat "$f"; fi; done > all; '
)
SHELL = {
    "file": 'head -c 40000 all > "$o"; sleep $d; echo end >> "$o"',
    "folder": 'mkdir -p "$o/sub"; head -c 500 all > "$o/f"; sleep $d; '
    'echo run > "$o/sub/g"; chmod 755 "$o/sub/g"',
    "large": f'head -c 4000 all > "$o"; sleep $d; head -c {LARGE} /dev/zero >> "$o"',
    "two": 'head -c 60000 all > "$o"; sleep $d; cat "$o" "$o" > "$o.extra"',
}
KINDS = ("file", "file", "folder", "large", "two")


def random_nodes(chance: random.Random, steps: int) -> list[Node]:
    """A graph: each step reads one to three of the sources and of the steps before it."""
    nodes: list[Node] = []
    for index in range(steps):
        there = [*SOURCES, *(node.output for node in nodes[-5:])]
        reads = chance.sample(there, min(len(there), chance.randint(1, 3)))
        kind = chance.choice(KINDS)
        name = f"n{index}" if chance.random() < 0.7 else f"deep/er/n{index}"
        nodes.append(Node(f"{name}.{kind}" + ("/" if kind == "folder" else ""), tuple(reads)))
    return nodes


def recipe(chance: random.Random, nodes: list[Node]) -> dict[str, Any]:
    """The recipe of a graph, at times with a script, and with a temporary artifact besides."""
    artifacts: dict[str, Any] = {}
    for node in nodes:
        kind = node.output.rstrip("/").rpartition(".")[2]
        artifacts[node.output] = step(kind, node.inputs, chance.uniform(0.0, LONGEST))
        if kind == "two":
            artifacts[node.output]["outputs"] = {"extra": f"{node.output}.extra"}
    last = nodes[-1].output
    if chance.random() < 0.3:  # a worker with Python in it costs as much as all the rest
        artifacts["run.sh"] = {"rule": "script", "options": {"template": "run.sh.j2", "word": "hi"}}
    artifacts["brief"] = {**step("file", (SOURCES[0],), 0.01), "temporary": True}
    artifacts["end"] = step("file", ("brief", last), 0.01)
    sources = {name: {"file": f"{name}.txt"} for name in SOURCES}
    return {"qbuild": 1, "name": "faults", "sources": sources, "artifacts": artifacts}


def step(kind: str, reads: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """One artifact of a recipe."""
    inputs = {f"i{place}": name for place, name in enumerate(reads)}
    words = ["${in." + name + "}" for name in inputs]
    argv = ["sh", "-c", BEGIN + SHELL[kind], "sh", f"{seconds:.3f}", "${out}", *words]
    return {"rule": "command", "inputs": inputs, "options": {"argv": argv}}


def write_project(root: Path, content: dict[str, Any]) -> None:
    """A project folder with this recipe. JSON is YAML: nothing here needs a YAML writer."""
    (root / "templates").mkdir(parents=True)
    (root / "templates/run.sh.j2").write_text(TEMPLATE)
    (root / RECIPE).write_text(json.dumps(content, indent=1))
    for name in SOURCES:
        write_source(root, name, "one")


def write_source(root: Path, name: str, word: str) -> None:
    """A source of some lines; another word makes every reader stale."""
    (root / f"{name}.txt").write_text(f"{name} {word}\n" * 30)
