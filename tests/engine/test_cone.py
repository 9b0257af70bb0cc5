"""The cone: what hangs on a few changes is judged and built as in the whole plan, and nothing
that was left for the next build is believed when it is not so."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from buildsys.engine import cone as cones
from buildsys.engine.build import Request, Tools, judge_all
from buildsys.engine.cone import Cone, build_cone, cone_of
from buildsys.engine.executor import Order
from buildsys.engine.project import Project, find_place
from buildsys.engine.staleness import Verdict
from buildsys.engine.standing import Answer, Difference, look
from buildsys.errors import RecipeError
from buildsys.plan.cached import to_json
from buildsys.plan.graph import Gate
from tests.engine.shop import WHERE, Failed, Say, Shop, concatenate, content_of, forget_modules

ROUNDS = 10
SEEDS = range(6)
PLAIN = ("one", "one", "one", "two", "folder", "same")


class Found(NamedTuple):
    """What the look at the standing answer led to. verdicts: of the cone's steps; None: the
    whole plan must be asked; empty: nothing is to be done."""

    verdicts: dict[str, Verdict] | None
    cone: Cone | None = None
    difference: Difference | None = None


class Workshop(Shop):
    """A shop whose plan is a recipe file's, so that plans are remembered and answers left."""

    def project(self) -> Project:
        project = super().project()
        recipe = Path(project.recipe)
        text = json.dumps(to_json(project.plan))
        if not recipe.exists() or recipe.read_text() != text:
            recipe.write_text(text)
        return project._replace(files=(project.recipe,))

    def own(self, name: str) -> Path:
        return self.build_root / ".qbuild" / name

    def look(self) -> Found:
        """As the command line looks; the lock of a difference is held until `release`."""
        project = self.project()
        place = find_place(project.recipe, {}, str(self.build_root))
        found = look(place) if place is not None else None
        if isinstance(found, Answer):
            return Found({})
        if found is None:
            return Found(None)
        cone = cone_of(found)
        if cone is None:
            found.lock.release()
            return Found(None)
        judge_all(cone.scene.survey, tuple(cone.numbers))
        verdicts = cone.scene.survey.verdicts
        return Found({name: verdicts[name] for name in cone.numbers}, cone, found)

    def release(self, found: Found) -> None:
        if found.difference is not None:
            found.difference.lock.release()

    def verdicts(self) -> dict[str, Verdict]:
        """Of all steps, from the whole plan and the whole journal."""
        forget_modules()
        return self.survey().survey.verdicts

    def build_found(self, found: Found) -> list[str]:
        """Build a cone; the steps that ran."""
        assert found.cone is not None
        assert found.difference is not None
        ran: list[str] = []
        forget_modules()
        tools = Tools(partial(self._executor, ran), lambda: Say([]), lambda line: None)
        request = Request(tuple(found.cone.numbers), frozenset(), keep_going=True)
        try:
            build_cone(found.cone, found.difference, request, tools)
        finally:
            self.release(found)
        return ran


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield Workshop(tmp_path)
    forget_modules()


def make_folder(order: Order) -> None:
    for path in order.context["outputs"].values():
        Path(path).mkdir()
        (Path(path) / "deep").mkdir()
    concatenate(
        order._replace(
            context={
                **order.context,
                "outputs": {k: f"{v}/deep/f" for k, v in order.context["outputs"].items()},
            }
        )
    )


def write_figure(order: Order) -> None:
    for path in order.context["outputs"].values():
        Path(path).write_text(json.dumps({"loss": 0.5}))


def always_the_same(order: Order) -> None:
    for path in order.context["outputs"].values():
        Path(path).write_text("constant")


def fails(order: Order) -> None:
    raise Failed("it fails")


def random_graph(shop: Workshop, chance: random.Random, kinds: Sequence[str]) -> None:
    """Sources that many read, steps of these kinds, and a gate."""
    names = [f"src{number}" for number in range(4)]
    for name in names:
        shop.source(name, f"{name}\n")
    for number in range(chance.randint(6, 18)):
        kind = chance.choice(kinds)
        reads = chance.sample(names[-8:] + ["src0"] * (number % 3 == 0), k=chance.randint(1, 3))
        name = f"s{number}/" if kind == "folder" else f"s{number}"
        optional = [f"?{each}" if chance.random() < 0.3 else each for each in reads]
        changes: dict[str, object] = {"options": {"text": name}}
        if kind == "two":
            changes["outputs"] = {"more": f"more{number}"}
        elif kind == "temporary":
            changes["temporary"] = True
        elif kind == "skipped":
            changes |= {"optional": True, "resources": {"gpu": 99}}
        if kind == "folder":
            shop.actions[name] = make_folder
        elif kind == "same":
            shop.actions[name] = always_the_same
        shop.step(name, *dict.fromkeys(optional), **changes)
        names.append(name)
    if chance.random() < 0.5:
        shop.step("figures.json", names[-1])
        shop.actions["figures.json"] = write_figure
        shop.gates.append(Gate("figures.json", "loss", 1.0, WHERE))


def outputs_of(shop: Workshop) -> list[Path]:
    found = [
        shop.build_root / path for step in shop.steps.values() for path in step.outputs.values()
    ]
    return [path for path in found if path.exists()]


def swap_with_old_times(path: Path) -> None:
    """Other bytes of the same length under the same times; another inode, as `mv` leaves it."""
    before = path.stat()
    other = path.with_name("swapped")
    other.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def disturb_output(shop: Workshop, chance: random.Random) -> None:
    paths = outputs_of(shop)
    if not paths:
        return
    path = chance.choice(paths)
    how = chance.randrange(5)
    if path.is_dir():
        if how < 2:
            shutil.rmtree(path)
        elif how == 2:
            (path / "new").write_text("new")
        else:
            swap_with_old_times(path / "deep/f")
    elif how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(path.read_bytes() + b"edited")
    elif how == 2:
        swap_with_old_times(path)
    elif how == 3:
        path.chmod(path.stat().st_mode ^ 0o100)
    else:
        path.write_bytes(path.read_bytes())  # touched, and equal


def disturb_source(shop: Workshop, chance: random.Random) -> None:
    path = shop.root / f"src{chance.randrange(4)}.txt"
    how = chance.randrange(3)
    if how == 0:
        path.write_text(f"{chance.random()}\n")
    elif how == 1:
        swap_with_old_times(path)
    else:
        path.touch()


def disturb_plan(shop: Workshop, chance: random.Random) -> None:
    name = chance.choice([name for name in shop.steps if shop.steps[name].options])
    shop.edit(name, text=f"{name}{chance.random()}")


def disturb_code(shop: Workshop, chance: random.Random) -> None:
    shop.code("arithmetic", f"SIGN = {chance.randrange(1000)}\n")


def disturb_journal(shop: Workshop, chance: random.Random) -> None:
    """What killed builds leave, and what a bad disk does."""
    journal = shop.own("journal")
    if not journal.exists():
        return
    how = chance.randrange(4)
    data = journal.read_bytes()
    if how == 0:
        journal.write_bytes(data + b"0badc0de {torn")
    elif how == 1:
        journal.write_bytes(data[: chance.randrange(len(data))])
    elif how == 2:
        lines = data.splitlines(keepends=True)
        journal.write_bytes(data + chance.choice(lines))  # an older line counts again
    else:
        at = chance.randrange(len(data))
        journal.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


def disturb_own_files(shop: Workshop, chance: random.Random) -> None:
    name = chance.choice(["index", "index", "answer", "stamps", "plan", "code"])
    path = shop.own(name)
    if not path.exists():
        return
    data = path.read_bytes()
    how = chance.randrange(3)
    if how == 0 or name in ("answer", "stamps", "plan", "code"):
        path.unlink()
    elif how == 1:
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        at = chance.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])


DISTURB: list[Callable[[Workshop, random.Random], None]] = [
    *[disturb_output] * 8,
    *[disturb_source] * 5,
    disturb_plan,
    disturb_code,
    disturb_journal,
    *[disturb_own_files] * 2,
]


def agree(found: Found, whole: dict[str, Verdict]) -> None:
    """The look says the same of every step as the whole judgement, in the same words."""
    if found.verdicts is None:
        return
    for name, verdict in whole.items():
        if name in found.verdicts:
            assert found.verdicts[name] == verdict, name
        else:
            assert verdict.state in ("fresh", "skipped"), (name, verdict)


@pytest.mark.parametrize("seed", SEEDS)
def test_cone_is_judged_and_built_as_the_whole_plan(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    # Where something is temporary or skipped the whole plan may be asked each time.
    plain = seed % 2 == 0
    random_graph(workshop, chance, PLAIN if plain else (*PLAIN, "temporary", "skipped"))
    workshop.build(keep_going=True)
    built = 0
    for _ in range(ROUNDS):
        for _ in range(chance.choice([1, 1, 2, 4])):
            chance.choice(DISTURB)(workshop, chance)
        whole = workshop.verdicts()
        found = workshop.look()
        agree(found, whole)
        if found.cone is None:
            workshop.build(keep_going=True)
        else:
            built += 1
            ending = chance.random()
            failing = chance.choice(list(workshop.steps))
            before = workshop.actions.get(failing)
            if ending < 0.15:
                workshop.actions[failing] = fails
            with monkeypatch.context() as patch:
                if ending > 0.85:  # killed behind the last journal line
                    patch.setattr(cones, "write_answer", lambda *given: None)
                elif ending > 0.7:  # killed between index and answer
                    patch.setattr("buildsys.engine.standing.write_json", lambda *given: None)
                ran = workshop.build_found(found)
            if before is None:
                workshop.actions.pop(failing, None)
            else:
                workshop.actions[failing] = before
            assert set(ran) <= set(found.verdicts or ())
        everything_is_as_believed(workshop, chance)
    assert built or not plain


def everything_is_as_believed(shop: Workshop, chance: random.Random) -> None:
    """What is left for the next build is believed only where a judgement that knows nothing of
    it agrees; now and then with no memory of digests either."""
    found = shop.look()
    shop.release(found)
    if chance.random() < 0.5:
        for name in ("stamps", "code"):
            shop.own(name).unlink(missing_ok=True)
    agree(found, shop.verdicts())


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
