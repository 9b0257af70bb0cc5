"""What a step on a worker gives back: the bytes, the journal line and the words of a local one;
and where it may run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from buildsys.engine.journal import read_journal
from tests.engine.dask import wares
from tests.engine.dask.crew import Crew, Running, crew_in, until


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> str:
    return wares.install(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory, plugins: str) -> Iterator[Crew]:
    """Two workers with one processor each; the first has a licence and an SDK of version 1."""
    root = tmp_path_factory.mktemp("crew")
    (root / "toolchains").mkdir()
    (root / "toolchains/sdk.yaml").write_text(SDK)
    for version in (1, 2):
        sdk = root / f"sdk{version}"
        sdk.mkdir()
        (sdk / "version.txt").write_text(f"version {version}.0\n")
    with crew_in(root, PYTHONPATH=plugins) as made:
        made.worker("--licence", "bonded=1", SDK_ROOT=str(root / "sdk1"))
        made.worker(SDK_ROOT=str(root / "sdk2"))
        yield made


SDK = """\
doc: for tests
find:
  - variable: SDK_ROOT
    file: version.txt
    version: [{file: version.txt, pattern: 'version ([0-9.]+)'}]
"""


def write(project: Path, **artifacts: Any) -> None:
    """A recipe, and a source folder `goods`."""
    (project / "goods/deep").mkdir(parents=True, exist_ok=True)
    (project / "goods/deep/a.txt").write_text("apples\n")
    (project / "goods/b.txt").write_text("pears\n")
    recipe = {
        "qbuild": 1,
        "name": "steps",
        "sources": {"goods": {"folder": str(project / "goods")}},
        "artifacts": artifacts,
    }
    (project / "r.yaml").write_text(json.dumps(recipe))


def shell(script: str, **more: Any) -> dict[str, Any]:
    return {"rule": "command", "options": {"argv": ["sh", "-c", script, "${out}"]}, **more}


def done(build: Running, code: int = 0) -> str:
    assert build.process.wait(60) == code, build.text
    return build.text


def tree(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Every artifact's bytes, and whether it can be executed."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), bool(path.stat().st_mode & 0o100))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".qbuild" not in path.parts
    }


def record(project: Path, step: str, folder: str = "build/steps") -> dict[str, Any]:
    line = read_journal(str(project / folder / ".qbuild/journal")).done[step]
    names = ("key", "outputs", "sizes", "notes", "warnings")
    return {name: line[name] for name in names}


def test_workers_make_what_this_machine_makes(crew: Crew, project: Path) -> None:
    write(
        project,
        **{
            "box/": {"rule": "ware", "inputs": {"i": ["goods"]}, "options": {"text": str(project)}},
            "two/": {"rule": "ware", "inputs": {"i": ["box/", "list"]}},
            "list": {
                "rule": "command",
                "inputs": {"b": "box/"},
                "options": {"argv": ["sh", "-c", 'ls "$0/inner" > "$1"', "${in.b}", "${out}"]},
            },
        },
    )
    text = done(crew.qbuild(project, "r.yaml"))
    assert "built 3" in text
    assert "warning: fragile" in text
    local = ["--build-dir", "here", "--executor", "local", "--no-cache"]
    done(crew.qbuild(project, "r.yaml", *local))
    made = tree(project / "build/steps")
    boxes = {f"{box}/{each}" for box in ("box", "two") for each in ("inner/text", "run.sh")}
    assert made.keys() == {"list", *boxes}
    assert made == tree(project / "here")
    assert record(project, "box/") == record(project, "box/", "here")
    log = (project / "build/steps/.qbuild/logs/box.log").read_text()
    assert log == "begun\ndone\n"
    assert "nothing to do" in done(crew.qbuild(project, "r.yaml"))


def test_progress_and_output_arrive_while_the_step_runs(crew: Crew, project: Path) -> None:
    gate = project / "gate"
    write(project, **{"box/": {"rule": "ware", "options": {"gate": str(gate)}}})
    build = crew.qbuild(project, "r.yaml", "--log-format", "json")
    log = project / "build/steps/.qbuild/logs/box.log"
    until(lambda: '"crates"' in build.text, "progress")
    until(lambda: log.exists() and log.read_text() == "begun\n", "output")
    gate.touch()
    events = [json.loads(line) for line in done(build).splitlines()]
    assert [e["step"] for e in events if e["event"] == "step_progress"][:1] == ["box/"]


def test_failed_step_shows_its_end_as_a_local_one_does(crew: Crew, project: Path) -> None:
    write(project, bad=shell("echo on the way; echo to ruin >&2; exit 3"))
    text = done(crew.qbuild(project, "r.yaml"), 1)
    assert "error: bad: sh ended with exit status 3" in text
    assert "  | on the way\n  | to ruin\n" in text
    assert "Traceback" not in text


def test_step_may_write_only_where_a_local_one_may(crew: Crew, project: Path) -> None:
    spill = project / "spill"
    write(project, bad=shell(f'echo x > {spill}; echo y > "$0"; test ! -e {spill}'))
    text = done(crew.qbuild(project, "r.yaml"), 0)
    assert not spill.exists() or "unconfined" in text


def test_licence_is_held_by_one_step_at_a_time_and_only_where_it_is(
    crew: Crew, project: Path
) -> None:
    script = 'date +%s.%N > "$0"; sleep 0.3; date +%s.%N >> "$0"'
    holding = {"resources": {"licence": "bonded"}}
    write(project, **{f"s{n}": shell(f"{script} # {project}", **holding) for n in range(3)})
    done(crew.qbuild(project, "r.yaml"))
    spans = sorted(
        tuple(map(float, (project / f"build/steps/s{n}").read_text().split())) for n in range(3)
    )
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"licence": "unheard-of"}, "lacks licence unheard-of"),
        ({"memory": "900TiB"}, "needs 921600.0 GiB of memory"),
    ],
)
def test_what_no_worker_has_is_said_at_once(
    crew: Crew, project: Path, wanted: dict[str, str], told: str
) -> None:
    write(project, bad=shell('echo > "$0"', resources=wanted))
    assert told in done(crew.qbuild(project, "r.yaml"), 1)


def test_step_goes_to_the_worker_with_the_toolchain_of_its_key(crew: Crew, project: Path) -> None:
    """This machine has no SDK; two workers have two versions. One is taken, the same each time,
    and the step runs where it is."""
    (project / "toolchains").symlink_to(crew.root / "toolchains")
    argv = ["sh", "-c", f'cat "$0/version.txt" > "$1" # {project}', "${toolchain.root}", "${out}"]
    write(project, told={"rule": "command", "toolchain": "sdk", "options": {"argv": argv}})
    assert "would run told: never built" in done(crew.qbuild(project, "r.yaml", "-n"))
    done(crew.qbuild(project, "r.yaml"))
    first = (project / "build/steps/told").read_text()
    assert first in ("version 1.0\n", "version 2.0\n")
    assert "nothing to do" in done(crew.qbuild(project, "r.yaml"))
    # With an SDK of its own, that version is taken, wherever the step then runs.
    other = 3 - int(first[8])
    done(crew.qbuild(project, "r.yaml", SDK_ROOT=str(crew.root / f"sdk{other}")))
    assert (project / "build/steps/told").read_text() == f"version {other}.0\n"


def test_worker_whose_sdk_was_exchanged_refuses_and_says_why(crew: Crew, project: Path) -> None:
    (project / "toolchains").symlink_to(crew.root / "toolchains")
    version = crew.root / "sdk2/version.txt"
    argv = ["sh", "-c", f'cat "$0/version.txt" > "$1" # {project}', "${toolchain.root}", "${out}"]
    write(project, told={"rule": "command", "toolchain": "sdk", "options": {"argv": argv}})
    # This machine agrees with what the worker published when it started, and not with what is
    # there now.
    old = project / "sdk"
    old.mkdir()
    (old / "version.txt").write_text("version 2.0\n")
    version.write_text("version 2.1\n")
    try:
        text = done(crew.qbuild(project, "r.yaml", SDK_ROOT=str(old)), 1)
    finally:
        version.write_text("version 2.0\n")
    assert "refuses it: toolchain 'sdk'" in text
    assert '"2.0" -> "2.1"' in text


def test_worker_with_other_code_refuses_and_says_why(
    crew: Crew, project: Path, tmp_path: Path
) -> None:
    other = wares.install(tmp_path / "other", mark="other")
    write(project, **{"box/": {"rule": "ware", "options": {"text": "x"}}})
    text = done(crew.qbuild(project, "r.yaml", PYTHONPATH=other), 1)
    assert "refuses it: the code of its rule has changed" in text
    assert "so do 1 more" in text


def test_worker_with_another_store_needs_a_cache(crew: Crew, project: Path) -> None:
    write(project, a=shell('echo > "$0"'))
    text = done(crew.qbuild(project, "r.yaml", QBUILD_CACHE=str(project / "own")), 2)
    assert "uses another store" in text
    assert "--cache URL" in text
    text = done(crew.qbuild(project, "r.yaml", QBUILD_CACHE=""), 2)
    assert "needs the store, and QBUILD_CACHE is empty" in text
    assert "--no-cache forbids it" in done(crew.qbuild(project, "r.yaml", "--no-cache"), 2)
    text = done(crew.qbuild(project, "r.yaml", "--cache", f"file://{project}/shared"), 2)
    assert "a key is needed" in text
    assert not (project / "shared").exists()


def test_dask_is_imported_only_where_it_is_asked_for(crew: Crew, project: Path) -> None:
    write(project, a=shell('echo > "$0"'))
    script = (
        "import sys; from buildsys.cli.main import main; code = main(['all', 'r.yaml']); "
        "print([n for n in sys.modules if n in ('distributed', 'dask', 'tornado')]); sys.exit(code)"
    )
    build = crew.start([sys.executable, "-c", script], folder=project)
    assert "[]" in done(build)
