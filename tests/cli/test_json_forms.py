"""What is printed for programs has the form that its schema says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cli.conftest import RECIPE, Qbuild, environment

DAILY = Path(__file__).resolve().parents[2] / "docs/daily.md"
BAD = "  bad: {rule: command, inputs: {i: a}, options: {argv: [sh, -c, 'exit 3', '${out}']}}\n"
SLOW = "  slow: {rule: command, inputs: {i: b}, options: {argv: [sh, -c, 'mkfifo p; cat p']}}\n"
SKIPPED = (
    "  q: {rule: command, toolchain: none-such, optional: true, inputs: {i: src}, "
    "options: {argv: [x]}}\n"
)


def validate(qbuild: Qbuild, form: str, value: object) -> None:
    schema = json.loads(qbuild("schema", "--of", form).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


def events_of(qbuild: Qbuild, printed: str) -> list[dict[str, Any]]:
    """The events of a stream, each valid."""
    events = [json.loads(line) for line in printed.splitlines()]
    schema = json.loads(qbuild("schema", "--of", "events").stdout)
    validator = jsonschema.Draft202012Validator(schema)
    for event in events:
        assert list(validator.iter_errors(event)) == [], event
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    return events


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def test_stream_tells_of_every_step_with_its_figures_and_digests(
    qbuild: Qbuild, project: Path
) -> None:
    (project / "tiny.yaml").write_text(RECIPE + BAD + SKIPPED)
    done = qbuild("all", "tiny.yaml", "-k", "--log-format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    events = events_of(qbuild, done.stdout)
    assert [events[0]["event"], events[-1]["event"]] == ["build_started", "build_ended"]
    started = {event["step"] for event in of_kind(events, "step_started")}
    assert started == {"a", "b", "sub/c", "bad"}
    ended = {event["step"]: event for event in of_kind(events, "step_ended")}
    assert {name: event["status"] for name, event in ended.items()} == {
        "a": "made",
        "b": "made",
        "sub/c": "made",
        "bad": "failed",
    }
    digests = {each["path"]: each["digest"] for each in ended["b"]["outputs"]}
    copies = {each["path"]: each["digest"] for each in ended["sub/c"]["outputs"]}
    assert digests["b"] == copies["sub/c"]  # sub/c is a copy of b
    assert ended["b"]["peak_rss"] > 0
    assert ended["bad"]["exit_code"] == 3
    assert Path(ended["bad"]["log"]).is_file()
    said = [event["text"] for event in of_kind(events, "message")]
    assert "skipped q: toolchain 'none-such' is not installed" in said
    last = events[-1]
    assert (last["status"], last["exit_code"], last["failed"]) == ("failed", 1, ["bad"])


def test_stream_of_a_build_with_nothing_to_do_still_begins_and_ends(qbuild: Qbuild) -> None:
    qbuild("all", "tiny.yaml")
    events = events_of(qbuild, qbuild("all", "--log-format", "json").stdout)
    assert [event["event"] for event in events] == ["build_started", "build_ended"]
    assert events[1]["status"] == "done"
    assert events[1]["fresh"] == ["a", "b", "sub/c"]


def test_stream_ends_with_the_error_that_kept_the_build_from_beginning(
    qbuild: Qbuild, project: Path
) -> None:
    (project / "tiny.yaml").write_text(RECIPE.replace("rule: command", "rule: comand", 1))
    done = qbuild("all", "tiny.yaml", "--log-format", "json")
    assert done.returncode == 2
    (event,) = events_of(qbuild, done.stdout)
    assert (event["status"], event["exit_code"]) == ("error", 2)
    assert "unknown rule 'comand'" in event["error"]


def test_restored_steps_are_cached_events(qbuild: Qbuild, project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE.replace("[cp,", "[sh, -c, 'sleep 0.2; cp $0 $1',"))
    command = [sys.executable, "-m", "buildsys"]
    variables = {**environment(project), "QBUILD_CACHE": str(project / "store")}

    def run(*words: str) -> str:
        return subprocess.run(
            [*command, *words],
            cwd=project,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    run("all", "tiny.yaml")
    run("clean")
    events = events_of(qbuild, run("all", "--log-format", "json"))
    cached = {event["step"]: event for event in of_kind(events, "cached")}
    assert {"a", "sub/c"} <= set(cached)
    assert cached["a"]["origin"] == "the store"
    assert set(events[-1]["restored"]) == set(cached)


def test_interrupted_steps_and_the_build_say_so(qbuild: Qbuild, project: Path) -> None:
    (project / "tiny.yaml").write_text(RECIPE + SLOW)
    with subprocess.Popen(
        [sys.executable, "-m", "buildsys", "all", "tiny.yaml", "--log-format", "json"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        seen = ""
        while not ('"slow", "why"' in seen and '"step": "sub/c", "key"' in seen):
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        seen += process.communicate(timeout=20)[0]
    assert process.returncode == 130
    events = events_of(qbuild, seen)
    ended = {event["step"]: event["status"] for event in of_kind(events, "step_ended")}
    assert ended["slow"] == "interrupted"
    assert (events[-1]["status"], events[-1]["exit_code"]) == ("interrupted", 130)
    assert events[-1]["not_started"] == ["slow"]


def test_listener_that_goes_away_does_not_end_the_build(qbuild: Qbuild, project: Path) -> None:
    command = f"{sys.executable} -m buildsys all tiny.yaml --log-format json"
    subprocess.run(
        ["sh", "-c", f"{command} | true"], cwd=project, env=environment(project), check=True
    )
    # `sh` waited for the last of the pipe only: the build's own lock says when it is over.
    done = qbuild("all", "tiny.yaml")
    assert done.stdout == "nothing to do: 3 artifacts are up to date\n"


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("status", ("status", "--json")),
        ("why", ("why", "*", "--json")),
        ("log", ("log", "--json")),
        ("forecast", ("all", "-n", "--log-format", "json")),
    ],
)
def test_printed_json_has_the_form_of_its_schema(
    qbuild: Qbuild, project: Path, form: str, words: tuple[str, ...]
) -> None:
    validate(qbuild, form, json.loads(qbuild(words[0], "tiny.yaml", *words[1:]).stdout))
    qbuild("all", "tiny.yaml")
    text = RECIPE.replace("word: hello", "word: bye").replace("sub/c:", "sub/d:")
    (project / "tiny.yaml").write_text(text + BAD + SKIPPED)
    qbuild("build", "bad")
    printed = qbuild(words[0], "tiny.yaml", *words[1:])
    validate(qbuild, form, json.loads(printed.stdout))
    if form == "status":
        states = {each["artifact"]: each["state"] for each in json.loads(printed.stdout)}
        assert set(states.values()) == {"fresh", "stale", "skipped", "orphan"}


def test_every_event_is_in_the_documents_with_its_keys(qbuild: Qbuild) -> None:
    rows = {
        line.split("`")[1]: line for line in DAILY.read_text().splitlines() if line[:3] == "| `"
    }
    schema = json.loads(qbuild("schema", "--of", "events").stdout)
    for form in schema["oneOf"]:
        row = rows[form["properties"]["event"]["const"]]
        keys = set(form["properties"]) - {"event", "time"}
        assert {key for key in keys if f"`{key}`" not in row} == set()
    assert set(rows) == {form["properties"]["event"]["const"] for form in schema["oneOf"]}
