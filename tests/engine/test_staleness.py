"""Only what is stale is built, for a reason that is stated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from buildsys.engine.key import differences
from buildsys.errors import RecipeError
from buildsys.identity import hash_file
from buildsys.plan.graph import Json
from tests.engine.shop import Shop, concatenate


def test_second_build_runs_nothing(chain: Shop) -> None:
    chain.build()
    assert chain.build().ran == []


def test_every_step_runs_once_in_a_first_build(chain: Shop) -> None:
    ran = chain.build().ran
    assert sorted(ran) == ["a", "b", "c", "d"]
    assert ran.index("a") < ran.index("b") < ran.index("c")
    assert chain.read("c") == "one\nABC"


def test_option_rebuilds_what_depends_on_it_and_nothing_else(chain: Shop) -> None:
    chain.build()
    chain.edit("b", text="X")
    assert chain.build().ran == ["b", "c"]
    assert chain.read("c") == "one\nAXC"


def test_why_names_the_option_and_both_values(chain: Shop) -> None:
    chain.build()
    chain.edit("b", text="X")
    assert chain.why("b") == ['option \'text\': "B" -> "X"']
    assert chain.state("c") == "unsure"
    assert chain.why("c") == ["reads b, which is to be made"]


def test_options_of_another_type_differ(chain: Shop) -> None:
    chain.edit("d", text=1)
    chain.build()
    chain.edit("d", text=True)
    assert chain.why("d") == ["option 'text': 1 -> true"]
    chain.edit("d", text=1.0)
    assert chain.why("d") == ["option 'text': 1 -> 1.0"]


def test_why_names_the_item_of_a_list(chain: Shop) -> None:
    chain.edit("d", text=["a", {"k": 1}])
    chain.build()
    chain.edit("d", text=["a", {"k": 2}])
    assert chain.why("d") == ["option 'text', item 2, k: 1 -> 2"]


def test_touching_a_source_rebuilds_nothing(chain: Shop) -> None:
    chain.build()
    os.utime(chain.root / "src.txt", (1, 1))
    assert chain.build().ran == []


def test_editing_a_source_rebuilds_its_readers(chain: Shop) -> None:
    chain.build()
    (chain.root / "src.txt").write_text("two\n")
    assert sorted(chain.build().ran) == ["a", "b", "c", "d"]


def test_edit_that_keeps_size_and_mtime_is_noticed(chain: Shop) -> None:
    path = chain.root / "src.txt"
    chain.build()
    before = path.stat()
    path.write_text("owt\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sorted(chain.build().ran) == ["a", "b", "c", "d"]


def test_input_that_comes_out_the_same_stops_the_rebuild(chain: Shop) -> None:
    chain.actions["a"] = always_the_same
    chain.build()
    (chain.root / "src.txt").write_text("two\n")
    assert sorted(chain.build().ran) == ["a", "d"]
    assert chain.build().ran == []


def always_the_same(order: Order) -> None:
    Path(order.context["outputs"]["out"]).write_text("same")


def test_deleted_output_is_built_again_and_nothing_else(chain: Shop) -> None:
    chain.build()
    (chain.build_root / "b").unlink()
    assert chain.why("b") == ["b is missing"]
    assert chain.build().ran == ["b"]
    assert chain.read("b") == "one\nAB"


def test_edited_output_is_built_again_and_nothing_else(chain: Shop) -> None:
    chain.build()
    (chain.build_root / "b").write_text("by hand")
    (reason,) = chain.why("b")
    assert reason.startswith("b was changed by hand")
    assert chain.build().ran == ["b"]
    assert chain.read("b") == "one\nAB"


def test_output_whose_executable_bit_changed_is_built_again(chain: Shop) -> None:
    chain.build()
    (chain.build_root / "b").chmod(0o755)
    assert chain.build().ran == ["b"]


def test_output_replaced_by_a_link_is_built_again(chain: Shop) -> None:
    chain.build()
    (chain.build_root / "b").rename(chain.root / "elsewhere")
    (chain.build_root / "b").symlink_to(chain.root / "elsewhere")
    assert chain.build().ran == ["b"]
    assert not (chain.build_root / "b").is_symlink()


def test_second_output_counts_too(shop: Shop) -> None:
    shop.source("src", "x")
    shop.step("a", "src", outputs={"extra": "deep/extra"})
    shop.step("b", "deep/extra")
    assert shop.build().ran == ["a", "b"]
    (shop.build_root / "deep/extra").unlink()
    assert shop.build().ran == ["a"]


def test_moved_tree_rebuilds_nothing(chain: Shop, tmp_path: Path) -> None:
    chain.build()
    chain.build_root.rename(tmp_path / "moved")
    chain.build_root = tmp_path / "moved"
    moved = chain.root / "other"
    moved.mkdir()
    shutil.move(chain.root / "src.txt", moved / "src.txt")
    chain.sources["src"] = chain.sources["src"]._replace(paths={"path": str(moved / "src.txt")})
    assert chain.build().ran == []


def test_copied_tree_rebuilds_nothing(chain: Shop, tmp_path: Path) -> None:
    chain.build()
    shutil.copytree(chain.build_root, tmp_path / "copy")
    chain.build_root = tmp_path / "copy"
    assert chain.build().ran == []


def test_removed_step_is_forgotten_by_the_others(chain: Shop) -> None:
    chain.build()
    del chain.steps["c"]
    assert chain.build().ran == []


def test_renamed_artifact_is_built_under_its_new_name(chain: Shop) -> None:
    chain.build()
    chain.steps["d2"] = chain.steps.pop("d")._replace(name="d2", outputs={"out": "d2"})
    assert chain.build().ran == ["d2"]


def test_target_builds_itself_and_what_it_needs(chain: Shop) -> None:
    assert chain.build("b").ran == ["a", "b"]


def test_forced_step_runs_and_its_readers_do_not(chain: Shop) -> None:
    chain.build()
    built = chain.build(forced=("a",))
    assert built.ran == ["a"]


def test_new_input_in_a_list_is_a_reason(chain: Shop) -> None:
    chain.step("all", "a", "d")
    chain.build()
    chain.step("all", "a", "b", "d")
    assert chain.why("all") == ["input 'i': b is new"]
    chain.step("all", "d", "a")
    assert chain.why("all") == ['input \'i\': order of its items: ["a", "d"] -> ["d", "a"]']


def test_an_input_without_items_is_told_as_new_or_gone_and_not_as_reordered() -> None:
    without: dict[str, Json] = {"inputs": {}}
    given: dict[str, Json] = {"inputs": {"rescale": []}}
    assert [str(each) for each in differences(without, given)] == ["input 'rescale' is new"]
    assert [str(each) for each in differences(given, without)] == [
        "input 'rescale' is no longer there"
    ]


def test_option_of_a_source_is_part_of_its_readers_keys(shop: Shop) -> None:
    shop.source("text", "words", kind="text", samples=8)
    shop.step("a", "text")
    shop.build()
    shop.sources["text"] = shop.sources["text"]._replace(options={"samples": 16})
    assert shop.why("a") == ["'text' option 'samples': 8 -> 16"]


def test_environment_and_threads_are_part_of_the_key(chain: Shop) -> None:
    chain.build()
    chain.steps["d"] = chain.steps["d"]._replace(environment={"LANG": "C"}, threads=2)
    assert chain.why("d") == ["threads: 1 -> 2", "environment variable 'LANG': (none) -> \"C\""]


def test_reservations_are_in_no_key(chain: Shop) -> None:
    chain.build()
    chain.steps["d"] = chain.steps["d"]._replace(resources={"memory": 1 << 30}, timeout=5.0)
    assert chain.build().ran == []


def test_missing_source_stops_before_anything_runs(chain: Shop) -> None:
    (chain.root / "src.txt").unlink()
    with pytest.raises(RecipeError, match="source 'src': there is no"):
        chain.build()
    assert not (chain.build_root / "a").exists()


def test_each_file_is_hashed_once_per_change(chain: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in range(8):
        chain.step(f"reader{each}", "src")
    assert chain.build().scene.stamps.hashed.count(str(chain.root / "src.txt")) == 1
    assert chain.survey().stamps.hashed.count(str(chain.root / "src.txt")) == 1


@pytest.mark.parametrize("ago", [1.0, -1.0])
def test_output_is_read_once_and_again_only_if_it_was_not_written_before_it_was_put_in_place(
    chain: Shop, monkeypatch: pytest.MonkeyPatch, ago: float
) -> None:
    """Also by the builds after the one that makes it, and where others read it."""
    read: list[str] = []

    def count(path: str) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr("buildsys.engine.stamps.hash_file", count)

    def act(order: Order) -> None:
        concatenate(order)
        for path in order.context["outputs"].values():
            time = Path(path).stat().st_mtime_ns - round(ago * 1e9)
            os.utime(path, ns=(time, time))

    chain.actions.update(dict.fromkeys(chain.steps, act))
    assert len(chain.build().ran) == 4
    made = [path for path in read if "/staging/" in path]
    assert len(made) == 4
    read.clear()
    assert chain.build().ran == []
    outputs = sorted(str(chain.build_root / name) for name in "abcd")
    assert sorted(path for path in read if path in outputs) == ([] if ago > 0 else outputs)
    chain.edit("d", text="x")
    read.clear()
    assert chain.build().ran == ["d"]
    assert sum("/staging/" in path for path in read) == 1
    if ago > 0:
        assert [path for path in read if path in outputs] == []
