"""The cone after random edits of random graphs: judged and built as in the whole plan."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from buildsys.engine import cone as cones
from buildsys.engine.staleness import Verdict
from buildsys.plan.graph import Gate
from tests.engine.answering_shop import (
    Found,
    Workshop,
    always_the_same,
    fails,
    make_folder,
    swap_with_old_times,
    write_figure,
)
from tests.engine.shop import WHERE

ROUNDS = 10
SEEDS = range(6)
PLAIN = ("one", "one", "one", "two", "folder", "same")


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
