"""--trace: what Perfetto can read, also of a build that was stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import RECIPE, Qbuild, environment

Event = Mapping[str, Any]
LICENSED = """\
  one: {rule: command, inputs: {i: a}, options: {argv: [sh, -c, 'sleep 0.2; cp $0 $1', "${in.i}",
    "${out}"]}, resources: {licence: qubee}}
  two: {rule: command, inputs: {i: a}, options: {argv: [sh, -c, 'sleep 0.2; cp $0 $1', "${in.i}",
    "${out}"]}, resources: {licence: qubee}}
"""


def events_of(path: Path) -> list[Event]:
    """The events, after everything that the format asks of them was checked."""
    events: list[Event] = json.loads(path.read_text())["traceEvents"]
    for event in events:
        assert event["ph"] in ("X", "M", "b", "e")
        assert isinstance(event["ts"], int)
        assert event["ts"] >= 0
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["name"]
        if event["ph"] == "X":
            assert isinstance(event["dur"], int)
            assert event["dur"] >= 0
    spans = [event for event in events if event["ph"] == "X"]
    tracks = {(event["pid"], event["tid"]) for event in spans}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert tracks <= named
    assert len({tid for _, tid in named}) == len(named)  # Perfetto tells threads by `tid` alone
    assert 0 not in {event["tid"] for event in events}
    assert {e["pid"] for e in events} == {e["pid"] for e in events if e["name"] == "process_name"}
    for track in tracks:
        assert_nested([e for e in spans if (e["pid"], e["tid"]) == track])
    assert_waits_match([event for event in events if event["ph"] in "be"])
    return events


def assert_nested(spans: list[Event]) -> None:
    """In the file's order each span is inside the one that is open, or after it."""
    open_until: list[int] = []
    last = 0
    for span in spans:
        start, end = span["ts"], span["ts"] + span["dur"]
        assert start >= last
        last = start
        while open_until and open_until[-1] <= start:
            open_until.pop()
        assert not open_until or end <= open_until[-1], span
        open_until.append(end)


def assert_waits_match(waits: list[Event]) -> None:
    """Every begin has its end, last begun first ended, for each step."""
    open_waits: dict[str, list[str]] = {}
    for wait in waits:
        names = open_waits.setdefault(wait["id"], [])
        if wait["ph"] == "b":
            names.append(wait["name"])
        else:
            assert names.pop() == wait["name"]
    assert not any(open_waits.values())


def spans_of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["cat"] == kind]


def qbuild_with_store(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "buildsys", *words],
        cwd=project,
        env={**environment(project), "QBUILD_CACHE": str(project / "store")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_trace_has_steps_waits_hashing_store_commit_and_planning(project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE + LICENSED)
    qbuild_with_store(project, "all", "tiny.yaml", "-j", "4", "--trace", "out.json")
    events = events_of(project / "out.json")
    steps = {event["name"]: event["args"] for event in spans_of(events, "step")}
    assert set(steps) == {"a", "b", "sub/c", "one", "two"}
    assert steps["a"]["outcome"] == "made"
    assert steps["a"]["why"] == ["never built"]
    assert set(steps["a"]["outputs"]) == {"a"}
    waits = {(event["id"], event["name"]) for event in events if event["ph"] == "b"}
    assert ("b", "dependencies") in waits
    assert {("one", "licence qubee"), ("two", "licence qubee")} & waits
    hashed = {event["args"]["path"] for event in spans_of(events, "hashing")}
    assert str(project / "src.txt") in hashed
    assert {"look up", "put"} <= {event["name"] for event in spans_of(events, "store")}
    commits = {event["name"] for event in spans_of(events, "commit")}
    assert {"commit", "fsync: outputs and intents", "fsync: folders and journal"} <= commits
    planning = {event["name"] for event in spans_of(events, "planning")}
    assert {"open the recipe", "judge what is stale"} <= planning


def test_two_steps_at_once_are_on_two_tracks(project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE + LICENSED.replace("qubee}", "other}", 1))
    qbuild_with_store(project, "all", "tiny.yaml", "-j", "2", "--trace", "out.json")
    steps = {event["name"]: event for event in spans_of(events_of(project / "out.json"), "step")}
    first, second = steps["one"], steps["two"]
    overlap = min(e["ts"] + e["dur"] for e in (first, second)) - max(first["ts"], second["ts"])
    assert (first["tid"] != second["tid"]) or overlap <= 0
    events = events_of(project / "out.json")
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {names[event["tid"]] for event in steps.values()} == {"worker 1", "worker 2"}


def test_restored_outputs_are_spans_of_the_store(project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE + LICENSED)
    qbuild_with_store(project, "all", "tiny.yaml")
    qbuild_with_store(project, "clean", "tiny.yaml")
    qbuild_with_store(project, "all", "tiny.yaml", "--trace", "out.json")
    store = spans_of(events_of(project / "out.json"), "store")
    taken = [event for event in store if event["name"] == "materialise"]
    assert [event["args"]["whole"] for event in taken] == [True] * len(taken)
    assert len(taken) >= 2


SLOW = "  slow: {rule: command, inputs: {i: b}, options: {argv: [sh, -c, 'mkfifo p; cat p']}}\n"


def test_build_stopped_by_ctrl_c_still_writes_a_readable_trace(project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE + SLOW)
    with subprocess.Popen(
        [sys.executable, "-m", "buildsys", "all", "tiny.yaml", "-v", "--trace", "out.json"],
        cwd=project,
        env=environment(project),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        seen = ""
        while not ("sub/c (" in seen and "slow:" in seen):
            seen += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    steps = spans_of(events_of(project / "out.json"), "step")
    outcomes = {event["name"]: event["args"]["outcome"] for event in steps}
    assert outcomes == {"a": "made", "b": "made", "sub/c": "made", "slow": "interrupted"}


def test_failed_step_says_so_in_the_trace(qbuild: Qbuild, project: Path) -> None:
    bad = "  bad: {rule: command, inputs: {i: a}, options: {argv: [sh, -c, exit 3, '${out}']}}\n"
    (project / "tiny.yaml").write_text(RECIPE + bad)
    assert qbuild("all", "tiny.yaml", "-k", "--trace", "out.json").returncode == 1
    (step,) = [
        event
        for event in spans_of(events_of(project / "out.json"), "step")
        if event["name"] == "bad"
    ]
    assert (step["args"]["outcome"], step["args"]["exit code"]) == ("failed", 3)


def test_null_build_is_traced_too(qbuild: Qbuild, project: Path) -> None:
    qbuild("all", "tiny.yaml")
    done = qbuild("all", "tiny.yaml", "--trace", "out.json")
    assert (done.returncode, done.stdout[:13]) == (0, "nothing to do")
    names = {event["name"] for event in events_of(project / "out.json")}
    assert "judge what is stale" in names


@pytest.mark.parametrize("place", ["none/out.json", "."])
def test_trace_that_cannot_be_written_is_said_before_anything_runs(
    qbuild: Qbuild, project: Path, place: str
) -> None:
    done = qbuild("all", "tiny.yaml", "--trace", place)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the trace {place} cannot be written: ")
    assert not (project / "build").exists()
