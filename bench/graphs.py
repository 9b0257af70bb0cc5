"""The same generated graph for every build tool: layers of 100 steps, 3 inputs each.

A step concatenates its inputs into its output through `sh -c`, which is what make and ninja
do for any command, so that the tools differ in nothing but themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LAYER = 100
INPUTS = 3


class Node(NamedTuple):
    """One step: its output's name and the files that it reads."""

    output: str
    inputs: tuple[str, ...]


def layers(steps: int) -> Iterator[Node]:
    """`steps` nodes; the first layer reads the source file `src`."""
    for index in range(steps):
        layer, place = divmod(index, LAYER)
        if layer == 0:
            yield Node(f"o{index}", ("src",))
        else:
            below = (layer - 1) * LAYER
            inputs = {f"o{below + (place + shift) % LAYER}": None for shift in range(INPUTS)}
            yield Node(f"o{index}", tuple(inputs))


def write_make(folder: Path, steps: int) -> None:
    """A Makefile with .DELETE_ON_ERROR."""
    nodes = list(layers(steps))
    lines = [".DELETE_ON_ERROR:", "all: " + " ".join(node.output for node in nodes)]
    for node in nodes:
        lines += [f"{node.output}: {' '.join(node.inputs)}", "\t@head -c 64 $^ > $@"]
    (folder / "Makefile").write_text("\n".join(lines) + "\n")


def write_ninja(folder: Path, steps: int) -> None:
    """A build.ninja."""
    lines = ["rule cat", "  command = head -c 64 $in > $out"]
    lines += [f"build {node.output}: cat {' '.join(node.inputs)}" for node in layers(steps)]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def write_doit(folder: Path, steps: int) -> None:
    """A dodo.py whose tasks run the same command."""
    nodes = [(node.output, node.inputs) for node in layers(steps)]
    text = f"""NODES = {nodes!r}
DOIT_CONFIG = {{"verbosity": 0}}
def task_s():
    for output, inputs in NODES:
        command = "head -c 64 " + " ".join(inputs) + " > " + output
        yield {{"name": output, "actions": [command], "file_dep": list(inputs),
               "targets": [output]}}
"""
    (folder / "dodo.py").write_text(text)


def write_snakemake(folder: Path, steps: int) -> None:
    """A Snakefile with one rule per step."""
    nodes = list(layers(steps))
    rules = [f"rule all:\n    input: {', '.join(repr(node.output) for node in nodes)}"]
    rules += [
        f"rule r_{node.output}:\n    input: {', '.join(map(repr, node.inputs))}\n"
        f"    output: {node.output!r}\n    shell: 'head -c 64 {{input}} > {{output}}'"
        for node in nodes
    ]
    (folder / "Snakefile").write_text("\n".join(rules) + "\n")


def write_qbuild(folder: Path, steps: int) -> None:
    """A recipe of `command` steps."""
    artifacts = {}
    for node in layers(steps):
        inputs = {f"i{place}": name for place, name in enumerate(node.inputs)}
        words = ["${in." + name + "}" for name in inputs]
        argv = ["sh", "-c", 'out=$1; shift; head -c 64 "$@" > "$out"', "sh", "${out}", *words]
        artifacts[node.output] = {
            "rule": "command",
            "inputs": inputs,
            "options": {"argv": argv},
        }
    recipe = {"qbuild": 1, "name": "bench", "sources": {"src": {"file": "src"}}}
    # JSON is YAML: nothing here needs a YAML writer.
    (folder / "bench.yaml").write_text(json.dumps({**recipe, "artifacts": artifacts}, indent=1))


def write_floor(folder: Path, steps: int) -> None:
    """For bench/floor.py: [[output, [input, ...]], ...] in an order that can be run."""
    (folder / "graph.json").write_text(json.dumps(list(layers(steps))))
