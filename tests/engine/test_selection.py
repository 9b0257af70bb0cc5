"""Temporary artifacts, skipped ones, orphans, gates: what is built, kept, removed and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buildsys.engine.cleaning import orphans, remove_all, remove_orphans, remove_outputs
from buildsys.engine.executor import Order
from buildsys.engine.gates import read_gates
from buildsys.engine.journal import read_journal
from buildsys.errors import RecipeError, ToolchainMissing
from buildsys.plan.graph import Gate
from tests.engine.shop import WHERE, Shop


@pytest.fixture
def with_temporary(shop: Shop) -> Shop:
    """src -> t (temporary) -> (x, y); x -> z."""
    shop.source("src", "one\n")
    shop.step("t", "src", options={"text": "T"}, temporary=True)
    shop.step("x", "t", options={"text": "X"})
    shop.step("y", "t", options={"text": "Y"})
    shop.step("z", "x", options={"text": "Z"})
    return shop


def there(shop: Shop) -> set[str]:
    return {path.name for path in shop.build_root.iterdir()} - {".qbuild"}


def test_temporary_artifact_is_removed_after_its_last_reader(with_temporary: Shop) -> None:
    assert sorted(with_temporary.build().ran) == ["t", "x", "y", "z"]
    assert there(with_temporary) == {"x", "y", "z"}
    assert with_temporary.build().ran == []


def test_temporary_artifact_stays_while_a_reader_is_not_built(with_temporary: Shop) -> None:
    with_temporary.build("z")
    assert there(with_temporary) == {"t", "x", "z"}
    assert with_temporary.build().ran == ["y"]
    assert there(with_temporary) == {"x", "y", "z"}


def test_removed_temporary_is_made_again_only_for_a_stale_reader(with_temporary: Shop) -> None:
    with_temporary.build()
    with_temporary.edit("z", text="ZZ")
    assert with_temporary.build().ran == ["z"]
    with_temporary.edit("x", text="XX")
    assert with_temporary.build().ran == ["t", "x", "z"]
    assert there(with_temporary) == {"x", "y", "z"}
    assert with_temporary.read("z") == "one\nTXXZZ"


def test_temporary_whose_reader_turns_out_fresh_is_not_made(shop: Shop) -> None:
    """r may run because s may change; s comes out the same, so neither r nor its t is made."""
    shop.source("src", "one\n")
    shop.source("other", "1\n")
    shop.step("t", "src", temporary=True)
    shop.step("s", "other")
    shop.actions["s"] = always_the_same
    shop.step("r", "t", "s")
    shop.build()
    (shop.root / "other.txt").write_text("2\n")
    assert shop.build().ran == ["s"]


def always_the_same(order: Order) -> None:
    Path(order.context["outputs"]["out"]).write_text("same")


def test_chain_of_removed_temporaries_is_made_again(shop: Shop) -> None:
    shop.source("src", "one\n")
    shop.step("t1", "src", temporary=True)
    shop.step("t2", "t1", temporary=True)
    shop.step("x", "t2")
    shop.build()
    assert there(shop) == {"x"}
    (shop.build_root / "x").unlink()
    assert shop.build().ran == ["t1", "t2", "x"]
    assert there(shop) == {"x"}


def test_stale_temporary_that_comes_out_the_same_rebuilds_no_reader(with_temporary: Shop) -> None:
    with_temporary.actions["t"] = always_the_same
    with_temporary.build()
    (with_temporary.root / "src.txt").write_text("two\n")
    assert with_temporary.build().ran == ["t"]
    assert there(with_temporary) == {"x", "y", "z"}


def test_temporary_that_is_asked_for_by_name_is_kept(with_temporary: Shop) -> None:
    with_temporary.build()
    assert with_temporary.build("t").ran == []
    (with_temporary.root / "src.txt").write_text("two\n")
    assert with_temporary.build("t").ran == ["t"]
    assert "t" in there(with_temporary)


def test_temporary_left_by_a_killed_build_is_removed_by_the_next(with_temporary: Shop) -> None:
    with_temporary.build()
    (with_temporary.build_root / "t").write_text("one\nT")
    assert with_temporary.build().ran == []
    assert there(with_temporary) == {"x", "y", "z"}


@pytest.fixture
def with_optional(shop: Shop) -> Shop:
    """src -> q (its toolchain is missing) -> r -> s; m reads src, and q where it is there."""
    shop.source("src", "one\n")
    shop.step("q", "src", toolchain="vendor-sdk", optional=True)
    shop.step("r", "q")
    shop.step("s", "r", "src", optional=True)
    shop.step("m", "src", "?q", options={"text": "M"})
    return shop


def test_missing_toolchain_skips_what_depends_on_it_and_shows_the_chain(
    with_optional: Shop,
) -> None:
    built = with_optional.build()
    assert built.ran == ["m"]
    why = "toolchain 'vendor-sdk' is not installed"
    chains = [
        f"skipped q: {why}",
        f"skipped r: needs q: {why}",
        f"skipped s: needs r: needs q: {why}",
    ]
    for line, chain in zip(built.said, chains, strict=False):
        assert line.startswith(chain)
    assert with_optional.read("m") == "one\nM"


def test_strict_and_naming_it_make_a_skip_an_error(with_optional: Shop) -> None:
    for ask in ({"words": ("s",)}, {"strict": True}):
        with pytest.raises(ToolchainMissing, match="vendor-sdk") as error:
            with_optional.build(*ask.pop("words", ()), **ask)
        assert error.value.exit_code == 3
    assert not (with_optional.build_root / "m").exists()


def test_toolchain_of_what_is_not_optional_is_an_error_before_anything_runs(shop: Shop) -> None:
    shop.source("src", "x")
    shop.step("a", "src")
    shop.step("q", "src", toolchain="vendor-sdk")
    with pytest.raises(ToolchainMissing, match="q: toolchain 'vendor-sdk'"):
        shop.build()
    assert not (shop.build_root / "a").exists()


def test_skipped_artifact_of_an_earlier_build_is_not_fresh(with_optional: Shop) -> None:
    with_optional.steps["q"] = with_optional.steps["q"]._replace(toolchain=None)
    with_optional.build()
    assert with_optional.state("q") == "fresh"
    with_optional.steps["q"] = with_optional.steps["q"]._replace(toolchain="vendor-sdk")
    assert with_optional.state("q") == "skipped"


def test_input_that_is_skipped_now_makes_its_reader_stale(with_optional: Shop) -> None:
    with_optional.steps["q"] = with_optional.steps["q"]._replace(toolchain=None)
    with_optional.build()
    assert with_optional.read("m") == "one\none\nM"
    with_optional.steps["q"] = with_optional.steps["q"]._replace(toolchain="vendor-sdk")
    (reason,) = with_optional.why("m")
    assert reason.startswith("input 'i': content of q: ")
    assert reason.endswith("-> (none)")
    assert with_optional.build().ran == ["m"]
    assert with_optional.read("m") == "one\nM"


def test_gpu_that_is_not_there_skips_an_optional_step_and_refuses_another(shop: Shop) -> None:
    shop.source("src", "x")
    shop.step("g", "src", resources={"gpu": 99}, optional=True)
    assert shop.build().said[0].startswith("skipped g: it needs 99 GPU, and there are ")
    shop.steps["g"] = shop.steps["g"]._replace(optional=False)
    with pytest.raises(ToolchainMissing, match="99 GPU"):
        shop.build()


def test_artifact_that_left_the_recipe_is_an_orphan_until_it_is_cleaned(chain: Shop) -> None:
    chain.step("deep/er/e", "src")
    chain.build()
    plan = chain.plan()
    del chain.steps["deep/er/e"], chain.steps["d"]
    folder = chain.project().folder
    entries = read_journal(folder.own("journal"))
    assert orphans(plan, entries, folder) == {}
    expected = {"d": ["d"], "deep/er/e": ["deep/er/e"]}
    assert orphans(chain.plan(), entries, folder) == expected
    assert sorted(remove_orphans(chain.plan(), entries, folder)) == ["d", "deep/er/e"]
    assert there(chain) == {"a", "b", "c"}
    assert orphans(chain.plan(), read_journal(folder.own("journal")), folder) == {}
    assert chain.build().ran == []


def test_live_artifact_inside_an_orphaned_folder_is_kept(shop: Shop) -> None:
    def tree(order: Order) -> None:
        path = Path(order.context["outputs"]["out"])
        path.mkdir()
        (path / "f").write_text("1")
        (path / "live").write_text("1")

    shop.source("src", "x")
    shop.step("d/", "src")
    shop.actions["d/"] = tree
    shop.build()
    del shop.steps["d/"]
    shop.step("d/live", "src")
    shop.build()
    folder = shop.project().folder
    removed = remove_orphans(shop.plan(), read_journal(folder.own("journal")), folder)
    assert removed == ["d/f"]
    assert shop.read("d/live") == "x"


def test_clean_removes_artifacts_and_leaves_other_files(chain: Shop) -> None:
    chain.step("deep/e", "src")
    chain.build()
    (chain.build_root / "mine").write_text("the user's own")
    removed = remove_outputs(chain.project().folder, ["a", "deep/e", "never made"])
    assert removed == ["a", "deep/e"]
    assert there(chain) == {"b", "c", "d", "mine"}
    assert sorted(chain.build().ran) == ["a", "deep/e"]


def test_clean_all_forgets_everything_but_the_lock(chain: Shop) -> None:
    chain.build()
    folder = chain.project().folder
    remove_all(folder, chain.plan(), read_journal(folder.own("journal")))
    left = {str(path.relative_to(chain.build_root)) for path in chain.build_root.rglob("*")}
    assert left == {".qbuild", ".qbuild/lock"}
    assert len(chain.build().ran) == 4


FIGURES = {"variants": {"int8.pth": {"drop": 0.25}, "q4 k": {"drop": 0.0, "bad": float("nan")}}}


def gate_on(shop: Shop, figure: str, limit: float = 0.1) -> Gate:
    shop.build_root.mkdir(exist_ok=True)
    (shop.build_root / "metrics.json").write_text(json.dumps(FIGURES))
    return Gate("metrics.json", figure, limit, WHERE)


@pytest.mark.parametrize(
    ("figure", "limit", "passed"),
    [
        ("int8.pth drop", 0.1, False),
        ("int8.pth drop", 0.25, True),
        ("q4 k drop", 0.0, True),
        ("variants int8.pth drop", 0.3, True),
        ("q4 k bad", 1e9, False),
    ],
)
def test_gate_compares_the_figure_that_it_names(
    shop: Shop, figure: str, limit: float, passed: bool
) -> None:
    (reading,) = read_gates([gate_on(shop, figure, limit)], shop.project().folder)
    assert reading.passed is passed


def test_gate_says_the_number(shop: Shop) -> None:
    (reading,) = read_gates([gate_on(shop, "int8.pth drop")], shop.project().folder)
    assert str(reading) == "gate fails: metrics.json int8.pth drop = 0.25 > 0.1"


def test_gate_on_a_figure_that_is_not_there_lists_those_that_are(shop: Shop) -> None:
    with pytest.raises(RecipeError, match=r"no figure 'int8\.pth typo'") as error:
        read_gates([gate_on(shop, "int8.pth typo")], shop.project().folder)
    assert error.value.remedy == "it has: int8.pth drop, q4 k drop, q4 k bad"
