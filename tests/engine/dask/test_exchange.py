"""Workers on other machines: everything travels through the shared cache, sealed.

The machine is the same, of course: the build believes it to be another, so that no worker reads
anything in place, and workers have stores of their own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.dask.crew import KEY, Crew, Running, crew_in

ELSEWHERE = """\
import sys
from buildsys.engine.dask import executor
from buildsys.cli.main import main
executor.machine_id = lambda: "another"
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    root = tmp_path_factory.mktemp("crew")
    with crew_in(root) as made:
        friend = {"QBUILD_CACHE": str(root / "friend"), "QBUILD_CACHE_KEY": KEY}
        made.worker("--licence", "friend", **friend)
        stranger = {"QBUILD_CACHE": str(root / "stranger"), "QBUILD_CACHE_KEY": "cd" * 32}
        made.worker("--licence", "stranger", **stranger)
        yield made


def build(crew: Crew, project: Path, who: str, **artifacts: Any) -> Running:
    for each in artifacts.values():
        each["resources"] = {"licence": who}
    recipe = {
        "qbuild": 1,
        "name": "far",
        "sources": {"goods": {"folder": "goods"}, "list": {"file": "list.txt"}},
        "artifacts": artifacts,
    }
    (project / "goods/deep").mkdir(parents=True)
    (project / "goods/deep/tool").write_text(f"#!/bin/sh\necho {project}\n")
    (project / "goods/deep/tool").chmod(0o755)
    (project / "list.txt").write_text("one\ntwo\n")
    (project / "r.yaml").write_text(json.dumps(recipe))
    words = ["all", "r.yaml", "--executor", crew.url, "--cache", f"file://{crew.root}/shared"]
    command = [sys.executable, "-c", ELSEWHERE, *words]
    return crew.start(command, project, QBUILD_CACHE_KEY=KEY)


def command(script: str, **inputs: str) -> dict[str, Any]:
    places = [f"${{in.{name}}}" for name in inputs]
    return {
        "rule": "command",
        "inputs": inputs,
        "options": {"argv": ["sh", "-c", script, "${out}", *places]},
    }


def test_inputs_and_outputs_travel_through_the_shared_cache(crew: Crew, project: Path) -> None:
    where = 'echo "read $1"; echo "read $2"; '
    done = build(
        crew,
        project,
        "friend",
        **{
            "out/": command(where + 'mkdir "$0"; cp -r "$1" "$0/goods"; sort -r "$2" > "$0/list"',
                            goods="goods", list="list"),
            "said": command('"$1/goods/deep/tool" > "$0"', out="out/"),
        },
    )  # fmt: skip
    assert done.process.wait(60) == 0, done.text
    made = project / "build/far"
    assert (made / "said").read_text() == f"{project}\n"
    assert (made / "out/list").read_text() == "two\none\n"
    read = (made / ".qbuild/logs/out.log").read_text().splitlines()
    # Under their own names, for rules tell by them what a file is; and nothing in its place here.
    assert [line.rpartition("/")[2] for line in read] == ["goods", "list.txt"]
    assert all(str(crew.root / "friend") in line and str(project) not in line for line in read)
    assert list((crew.root / "friend/workers").glob("*/qbuild-*")) == []


def test_worker_without_the_key_gets_nothing(crew: Crew, project: Path) -> None:
    done = build(crew, project, "stranger", a=command('cat "$1" > "$0"', list="list"))
    assert done.process.wait(60) == 1
    assert "is not sealed with your key" in done.text
    assert not (project / "build/far/a").exists()


def test_what_a_worker_without_the_key_made_is_not_believed(crew: Crew, project: Path) -> None:
    done = build(crew, project, "stranger", a=command(f'echo {project} > "$0"'))
    assert done.process.wait(60) == 1
    assert "made the outputs, but they did not arrive" in done.text
    assert "is not sealed with your key" in done.text
    assert not (project / "build/far/a").exists()
