"""What runs when: never more than the machine has, and the longest path first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from buildsys.engine.executor import Order
from buildsys.engine.journal import Entries, Line
from buildsys.engine.runner import make_tasks
from buildsys.engine.schedule import (
    Capacity,
    Claim,
    Pool,
    available_memory,
    claim_of,
    longest_paths,
)
from tests.engine.shop import Failed, Shop

GIB = 1 << 30
MACHINE = Capacity(jobs=4, threads=4, memory=16 * GIB, gpus=1)


def claim(threads: int = 1, memory: int = 0, gpus: int = 0, licences: Sequence[str] = ()) -> Claim:
    return Claim(threads, memory, gpus, frozenset(licences))


@pytest.mark.parametrize(
    ("running", "asked", "fits"),
    [
        ([claim()] * 3, claim(), True),
        ([claim()] * 4, claim(), False),
        ([claim(threads=3)], claim(threads=2), False),
        ([claim(memory=10 * GIB)], claim(memory=6 * GIB), True),
        ([claim(memory=10 * GIB)], claim(memory=7 * GIB), False),
        ([claim(gpus=1)], claim(gpus=1), False),
        ([], claim(gpus=2), False),
        ([claim(licences=["qubee"])], claim(licences=["qubee"]), False),
        ([claim(licences=["qubee"])], claim(licences=["tpu"]), True),
        ([], claim(threads=64, memory=99 * GIB), True),  # larger than the machine: alone
        ([claim()], claim(memory=99 * GIB), False),
    ],
)
def test_claims_never_exceed_the_machine(running: list[Claim], asked: Claim, fits: bool) -> None:
    pool = Pool(MACHINE)
    for number, each in enumerate(running):
        pool.take(str(number), each)
    assert pool.fits(asked) is fits
    if running and not fits:
        for number in range(len(running)):
            pool.give_back(str(number))
        assert pool.fits(asked) or asked.gpus > MACHINE.gpus


def entries(**walls: float) -> Entries:
    done = {name: Line({"wall": wall, "memory": 3 * GIB}) for name, wall in walls.items()}
    return Entries(done, {}, (), 0)


def test_reservation_is_the_recipes_figure_else_the_last_peak_else_an_estimate(chain: Shop) -> None:
    step = chain.steps["a"]
    assert claim_of(step, entries()).memory == 0
    assert claim_of(step, entries(), lambda step: 5 * GIB).memory == 5 * GIB
    peak = claim_of(step, entries(a=1), lambda step: 5 * GIB)
    assert 3 * GIB < peak.memory <= 3.5 * GIB
    assert peak.limit is None  # what was seen once is no promise
    wanting = step._replace(resources={"memory": GIB, "licence": "qubee", "gpu": 1, "jobs": 2})
    asked = Claim(1, GIB, 1, frozenset(["qubee"]), limit=GIB + GIB // 4, jobs=2)
    assert claim_of(wanting, entries(a=1)) == asked


def test_longest_path_counts_what_waits_for_a_step(chain: Shop) -> None:
    """src -> a -> b -> c, and src -> d."""
    plan = chain.plan()
    paths = longest_paths(plan, plan.steps, entries(a=1, b=2, c=3, d=5))
    assert paths == {"a": 6, "b": 5, "c": 3, "d": 5}


def test_longest_path_runs_first(shop: Shop) -> None:
    shop.source("src", "x")
    shop.step("short", "src")
    shop.step("head", "src")
    shop.step("tail", "head")
    assert shop.build(jobs=1).ran == ["head", "short", "tail"]


def test_only_what_may_run_becomes_a_task(chain: Shop) -> None:
    chain.build()
    (chain.build_root / "b").unlink()
    survey = chain.survey().survey
    names = [name for name, verdict in survey.verdicts.items() if verdict.state != "fresh"]
    assert names == ["b", "c"]
    assert len(make_tasks(survey, names)) == 2


def test_wide_graph_is_committed_whole(shop: Shop) -> None:
    """More steps than a commit group holds."""
    shop.source("src", "x")
    for number in range(230):
        shop.step(f"wide/{number}", "src", options={"text": number})
    shop.step("all", *(f"wide/{number}" for number in range(230)))
    built = shop.build()
    assert len(built.ran) == 231
    assert shop.read("all") == "".join(f"x{number}" for number in range(230))
    assert shop.build().ran == []


def test_failure_in_a_group_costs_only_itself(shop: Shop) -> None:
    def fail(order: Order) -> None:
        raise Failed("no")

    shop.source("src", "x")
    for number in range(20):
        shop.step(f"w{number}", "src")
    shop.actions["w7"] = fail
    built = shop.build(keep_going=True, jobs=1)
    assert list(built.failures) == ["w7"]
    del shop.actions["w7"]
    assert shop.build().ran == ["w7"]


def test_available_memory_is_what_the_kernel_says() -> None:
    assert 0 < available_memory() < 1 << 50
