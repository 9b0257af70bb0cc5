"""The cone: what hangs on a few changes is judged and built as in the whole plan, and nothing
that was left for the next build is believed when it is not so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from buildsys.errors import RecipeError
from buildsys.plan.graph import Gate
from tests.engine.answering_shop import (
    Workshop,
    fails,
    make_folder,
    swap_with_old_times,
    write_figure,
)
from tests.engine.shop import WHERE, concatenate, content_of


def linear(shop: Workshop) -> None:
    """src -> a -> b, src -> c, other -> d; all built, with an answer."""
    shop.source("src", "one\n")
    shop.source("other", "two\n")
    shop.step("a", "src")
    shop.step("b", "a")
    shop.step("c", "src")
    shop.step("d", "other")
    shop.build()


def looked(shop: Workshop) -> list[str] | None:
    """The cone's steps."""
    found = shop.look()
    shop.release(found)
    return None if found.verdicts is None else list(found.verdicts)


def test_cone_is_what_hangs_on_a_change_and_no_more(workshop: Workshop) -> None:
    linear(workshop)
    assert looked(workshop) == []
    (workshop.build_root / "a").unlink()
    assert looked(workshop) == ["a", "b"]
    (workshop.root / "other.txt").write_text("three\n")
    assert looked(workshop) == ["a", "b", "d"]


def test_build_of_a_cone_leaves_the_answer_for_the_next(workshop: Workshop) -> None:
    linear(workshop)
    (workshop.root / "other.txt").write_text("three\n")
    assert workshop.build_found(workshop.look()) == ["d"]
    assert looked(workshop) == []
    (workshop.build_root / "d").unlink()
    found = workshop.look()
    assert [str(each) for each in (found.verdicts or {})["d"].reasons] == ["d is missing"]
    assert workshop.build_found(found) == ["d"]
    assert workshop.read("d") == "three\n"


def test_equal_outputs_end_a_cone_early(workshop: Workshop) -> None:
    linear(workshop)
    (workshop.build_root / "a").write_text("by hand")
    assert workshop.build_found(workshop.look()) == ["a"]
    assert looked(workshop) == []


def test_source_edited_while_a_cone_is_built_is_no_part_of_the_answer(workshop: Workshop) -> None:
    linear(workshop)

    def edits(order: Order) -> None:
        concatenate(order)
        (workshop.root / "other.txt").write_text("edited meanwhile\n")

    workshop.actions["b"] = edits
    (workshop.build_root / "b").unlink()
    assert workshop.build_found(workshop.look()) == ["b"]
    assert looked(workshop) is None
    assert workshop.state("d") == "stale"


def test_output_edited_while_a_cone_is_built_is_found_by_the_next(workshop: Workshop) -> None:
    linear(workshop)

    def edits(order: Order) -> None:
        concatenate(order)
        (workshop.build_root / "c").write_text("edited meanwhile\n")

    workshop.actions["b"] = edits
    (workshop.build_root / "b").unlink()
    assert workshop.build_found(workshop.look()) == ["b"]
    assert looked(workshop) == ["c"]


def test_failed_step_leaves_no_answer(workshop: Workshop) -> None:
    linear(workshop)
    workshop.actions["b"] = fails
    (workshop.root / "src.txt").write_text("three\n")
    assert workshop.build_found(workshop.look()) == ["a", "c", "b"]
    assert looked(workshop) is None


def test_index_of_another_build_counts_for_nothing(workshop: Workshop) -> None:
    linear(workshop)
    old = workshop.own("index").read_bytes()
    (workshop.root / "src.txt").write_text("three\n")
    workshop.build()
    workshop.own("index").write_bytes(old)
    assert looked(workshop) == []
    (workshop.build_root / "d").unlink()
    assert looked(workshop) is None


def test_plan_file_that_was_altered_behind_its_header_is_not_believed(workshop: Workshop) -> None:
    linear(workshop)
    plan = workshop.own("plan")
    plan.write_bytes(plan.read_bytes().replace(b'"a:a"', b'"a:d"'))
    (workshop.build_root / "b").unlink()
    assert looked(workshop) is None


def test_temporary_and_skipped_steps_are_left_to_the_whole_plan(workshop: Workshop) -> None:
    workshop.source("src", "one\n")
    workshop.step("t", "src", temporary=True)
    workshop.step("u", "t")
    workshop.step("no", "src", optional=True, resources={"gpu": 99})
    workshop.step("v", "?no", "src")
    workshop.step("w", "src")
    workshop.build()
    assert looked(workshop) == []
    for name, cone in {"u": None, "v": None, "w": ["w"]}.items():
        (workshop.build_root / name).unlink()
        assert looked(workshop) == cone
        assert workshop.build().ran == ([*"tu"] if name == "u" else [name])


def test_gate_is_read_again_after_its_artifact_was_made_again(workshop: Workshop) -> None:
    linear(workshop)
    workshop.step("figures.json", "b")
    workshop.actions["figures.json"] = write_figure
    workshop.gates.append(Gate("figures.json", "loss", 1.0, WHERE))
    workshop.build()
    assert looked(workshop) == []

    def worse(order: Order) -> None:
        Path(order.context["outputs"]["out"]).write_text(json.dumps({"loss": 2.0}))

    workshop.actions["figures.json"] = worse
    (workshop.build_root / "figures.json").unlink()
    assert workshop.build_found(workshop.look()) == ["figures.json"]
    assert looked(workshop) is None


def test_journal_is_read_whole_when_most_of_its_lines_no_longer_count(workshop: Workshop) -> None:
    linear(workshop)
    sizes = []
    for _ in range(80):
        (workshop.build_root / "d").unlink()
        found = workshop.look()
        if found.cone is None:
            workshop.build()
        else:
            workshop.build_found(found)
        sizes.append(workshop.own("journal").stat().st_size)
    assert min(sizes[40:]) < sizes[39]
    assert workshop.state("d") == "fresh"


def test_source_that_is_gone_is_left_to_the_whole_plan(workshop: Workshop) -> None:
    linear(workshop)
    (workshop.root / "other.txt").unlink()
    assert looked(workshop) is None
    with pytest.raises(RecipeError):
        workshop.survey()


def test_second_build_waits_for_one_that_has_found_a_difference(workshop: Workshop) -> None:
    linear(workshop)
    (workshop.build_root / "d").unlink()
    first = workshop.look()
    assert first.cone is not None
    assert workshop.look().verdicts is None
    assert workshop.build_found(first) == ["d"]
    assert looked(workshop) == []


def test_plan_of_which_nothing_was_ever_made_leaves_no_index(workshop: Workshop) -> None:
    workshop.step("no", optional=True, resources={"gpu": 99})
    assert workshop.build().ran == []
    assert looked(workshop) is None
    assert not workshop.own("index").exists()


def test_content_of_a_folder_is_told_apart(workshop: Workshop) -> None:
    workshop.source("src", "one\n")
    workshop.actions["tree/"] = make_folder
    workshop.step("tree/", "src")
    workshop.step("after", "tree/")
    workshop.build()
    swap_with_old_times(workshop.build_root / "tree/deep/f")
    assert looked(workshop) == ["tree/", "after"]
    assert workshop.build_found(workshop.look()) == ["tree/"]
    assert content_of(workshop.build_root / "tree") == b"one\n"
