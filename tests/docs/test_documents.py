"""Every command in the documents runs, and prints what the documents say it prints.

A fenced block marked `console` holds commands (`$ ...`, going on in lines that begin with `> `)
and what they print. The blocks of
one document run in order in one fresh project folder. Each printed line that is shown must
occur in the output, in that order; "..." stands for anything. A comment `# exit N` on a command
names the exit code that it must end with (0 without).
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXIT = re.compile(r"#\s*exit (\d+)\s*$")


class Command(NamedTuple):
    line: str
    exit_code: int
    shown: tuple[str, ...]


def commands(text: str) -> Iterator[Command]:
    for block in BLOCK.findall(text):
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
        for part in parts:
            first, *others = part.rstrip("\n").split("\n")
            more = list(takewhile(lambda line: line.startswith(">"), others))
            line = "\n".join([first, *(each[2:] for each in more)])
            said = EXIT.search(first)
            shown = tuple(each for each in others[len(more) :] if each.strip())
            yield Command(line, int(said[1]) if said else 0, shown)


def matcher(line: str) -> re.Pattern[str]:
    return re.compile(
        r"\s+".join(re.escape(word) for word in line.split()).replace(r"\.\.\.", ".*")
    )


def missing_line(shown: tuple[str, ...], printed: str) -> str | None:
    """The first shown line that does not occur after the ones before it."""
    rest = iter(printed.splitlines())
    for line in shown:
        if line.strip() != "..." and not any(matcher(line).search(have) for have in rest):
            return line
    return None


def with_commands() -> list[Path]:
    return [path for path in DOCUMENTS if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("document", with_commands(), ids=lambda path: path.name)
def test_commands_of_the_document_run_and_print_what_it_says(
    document: Path, tmp_path: Path
) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "COLUMNS": "80", "HOME": str(tmp_path)}
    environment["QBUILD_CACHE"] = str(tmp_path / "cache")
    project = tmp_path / "project"
    project.mkdir()
    for command in commands(document.read_text()):
        done = subprocess.run(
            ["bash", "-c", command.line],
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        printed = done.stdout
        assert done.returncode == command.exit_code, f"$ {command.line}\n{printed}"
        absent = missing_line(command.shown, printed)
        assert absent is None, f"$ {command.line}\nshould print: {absent}\nprinted:\n{printed}"


def test_readme_opens_with_its_two_commands() -> None:
    head = (ROOT / "README.md").read_text().split("```")[1]
    lines = [line.split("#")[0].strip() for line in head.strip().splitlines()]
    assert lines == [
        "pip install -e '.[dev]' && qbuild all recipes/qwen2vl.yaml",
        "pip install -e '.[dev]' && pytest",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []
