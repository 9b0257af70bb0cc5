"""docs/reference.md is what qbuild itself says of its recipes and rules."""

import difflib
from pathlib import Path

import pytest

from buildsys.cli.main import main
from buildsys.recipe.reference import kind_of, reference
from buildsys.rules import find_rule, rule_modules

WRITTEN = Path(__file__).resolve().parents[2] / "docs/reference.md"
REMEDY = "make it again: qbuild schema --markdown > docs/reference.md"


def test_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--markdown"]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = WRITTEN.read_text(encoding="utf-8").splitlines()
    changes = "\n".join(difflib.unified_diff(written, printed, "written", "now", n=0, lineterm=""))
    assert not changes, f"{REMEDY}\n{changes}"


@pytest.mark.parametrize("name", sorted(rule_modules()))
def test_everything_of_a_rule_is_described(name: str) -> None:
    rule = find_rule(name)
    text = "\n".join(reference({name: rule}))
    assert f"### {name}" in text
    rows = [line.split(" | ") for line in text.split(f"### {name}")[1].splitlines()]
    named = {cells[0].removeprefix("| "): cells for cells in rows}
    for each in (*rule.inputs, *rule.options):
        assert named[f"`{each}`"][-1].rstrip(" |"), f"{each} of {name} has no description"
    for each in rule.outputs:
        assert f"`{each}`: " in text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": [None, 1, "all"]}, "`null`, `1`, `all`"),
        ({"type": ["integer", "null"], "minimum": 1}, "whole number ≥ 1 or null"),
        ({"type": "number", "exclusiveMinimum": 0}, "number > 0"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
         "text or list of text"),
        ({}, "any value"),
    ],
)  # fmt: skip
def test_a_schema_is_told_in_words(schema: dict[str, object], words: str) -> None:
    assert kind_of(schema) == words
