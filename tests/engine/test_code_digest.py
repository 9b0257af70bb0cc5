"""What of a rule's code counts: what can decide bytes, and nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from buildsys.engine import code, stamps
from buildsys.engine.executor import Order
from tests.engine.shop import PACKAGE, RULE_CODE, Shop, concatenate

SAME = {
    "a comment": RULE_CODE.replace("def make", "# why\ndef make"),
    "a docstring": RULE_CODE.replace("The rule of the tests.", "Another text."),
    "layout": RULE_CODE.replace("return SIGN", "return (\n        SIGN\n    )"),
    "the table of the rule": RULE_CODE + 'RULE = {"doc": "text for people"}\n',
}
OTHER = {
    "a constant": RULE_CODE.replace("return SIGN", "return SIGN + 1"),
    "a name": RULE_CODE.replace("step", "context"),
    "an import": RULE_CODE.replace("import SIGN", "import SIGN, SIGN as OTHER"),
}


@pytest.mark.parametrize("what", SAME)
def test_what_decides_no_bytes_rebuilds_nothing(chain: Shop, what: str) -> None:
    chain.build()
    chain.code("rule", SAME[what])
    assert chain.build().ran == []


@pytest.mark.parametrize("what", OTHER)
def test_changed_code_rebuilds_and_is_named(chain: Shop, what: str) -> None:
    chain.build()
    chain.code("rule", OTHER[what])
    (reason,) = chain.why("a")
    assert reason.startswith("the code of its rule has changed")
    assert "a" in chain.build().ran


def test_code_that_the_rule_imports_counts(chain: Shop) -> None:
    chain.build()
    chain.code("arithmetic", "SIGN = -1\n")
    assert chain.state("d") == "stale"


def test_imports_inside_functions_count(chain: Shop) -> None:
    chain.code("late", "LATE = 1\n")
    chain.code("rule", f"def make(step):\n    from {PACKAGE} import late\n    return late\n")
    chain.build()
    chain.code("late", "LATE = 2\n")
    assert chain.state("d") == "stale"


def test_relative_imports_count(chain: Shop) -> None:
    chain.code("rule", "from . import arithmetic\n\n\ndef make(step):\n    return arithmetic\n")
    chain.build()
    chain.code("arithmetic", "SIGN = -1\n")
    assert chain.state("d") == "stale"


def test_imports_for_the_type_checker_do_not_count(chain: Shop) -> None:
    chain.code("types", "class Shape: ...\n")
    head = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {PACKAGE} import types\n"
    chain.code("rule", head + RULE_CODE)
    chain.build()
    chain.code("types", "class Form: ...\n")
    assert chain.build().ran == []


def test_interchangeable_kernels_do_not_count(chain: Shop) -> None:
    chain.code("kernel", "INTERCHANGEABLE_KERNEL = True\nFAST = 1\n")
    chain.code("rule", RULE_CODE + f"from {PACKAGE} import kernel\n")
    chain.build()
    chain.code("kernel", "INTERCHANGEABLE_KERNEL = True\nFASTER = 2\n")
    assert chain.build().ran == []


def test_computed_imports_count_with_their_whole_package(chain: Shop) -> None:
    chain.code("plug", "VALUE = 1\n")
    body = f"    importlib.import_module('{PACKAGE}.' + step)\n"
    chain.code("rule", f"import importlib\n\n\ndef make(step):\n{body}")
    chain.build()
    chain.code("plug", "VALUE = 2\n")
    assert chain.state("d") == "stale"


def test_code_edited_while_a_step_runs_is_not_stored_under_the_old_key(chain: Shop) -> None:
    def edit(order: Order) -> None:
        chain.code("arithmetic", "SIGN = 7\n")
        concatenate(order)

    chain.actions["d"] = edit
    built = chain.build("d")
    assert "the code of its rule has changed" in built.failures["d"]
    assert not (chain.build_root / "d").exists()
    del chain.actions["d"]
    assert chain.build("d").ran == ["d"]
    assert chain.build("d").ran == []


def test_null_survey_parses_nothing(chain: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.build()
    monkeypatch.setattr(stamps, "SETTLED_NS", -(1 << 62))  # every stamp counts as settled
    chain.build()
    monkeypatch.setattr(code, "read_module", lambda *_: pytest.fail("a module was parsed"))
    for path in (chain.root / PACKAGE).glob("*.py"):
        os.utime(path)
    assert chain.build().ran == []


def test_code_behind_a_real_rule_is_its_mathematics_and_not_the_engine(tmp_path: Path) -> None:
    stamps_here = stamps.Stamps(str(tmp_path), str(tmp_path / "stamps"))
    rules = code.RuleCode(stamps_here, str(tmp_path / "code"), tuple(sys.path))
    behind = rules.closure("buildsys.rules.int8_checkpoint")
    assert {"buildsys.quant.int8", "buildsys.models.qwen2", "buildsys.formats.tensors"} <= set(
        behind
    )
    rooms = {name.split(".")[1] for name in behind}
    assert rooms == {"rules", "quant", "formats", "models"}
    assert "buildsys.rules.spec" not in behind
    assert rules.closure("buildsys.rules.command").keys() == {"buildsys.rules.command"}
