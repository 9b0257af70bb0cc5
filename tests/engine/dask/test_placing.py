"""Which worker may run which step, and what a URL says; no worker is needed for that."""

from __future__ import annotations

import pytest

from buildsys.engine.dask.address import Address, parse
from buildsys.engine.dask.offer import (
    CPU,
    MEMORY,
    Offer,
    cut_to_fit,
    in_words,
    lacking,
    needs_of,
    offer_here,
    resources_of,
)
from buildsys.engine.dask.session import agreed, as_workers_have
from buildsys.engine.executor import Order
from buildsys.engine.schedule import Capacity, Claim
from buildsys.engine.staleness import Machine
from buildsys.errors import UsageError

GIB = 1 << 30


def offer(cpus: int = 2, memory: int = 4 * GIB, gpus: int = 0, **more: object) -> Offer:
    made = offer_here(Capacity(cpus, cpus, memory, gpus), {}, {}, "/store")
    return made._replace(**more)


def order(claim: Claim, isa: str | None = None, **toolchain: object) -> Order:
    parts = {"isa": isa, "toolchain": toolchain}
    return Order(
        "s", "", (), {}, {}, "", "", "light", 1, None, None, claim=claim, parts=parts
    )  # fmt: skip


def claim(threads: int = 1, memory: int = 0, gpus: int = 0, *licences: str) -> Claim:
    return Claim(threads, memory, gpus, frozenset(licences))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("dask://local", Address("", 2, 60.0)),
        ("dask://local?workers=5", Address("", 5, 60.0)),
        ("dask://box:8786", Address("tcp://box:8786", 0, 10.0)),
        ("dask://10.0.0.1:8786?wait=90", Address("tcp://10.0.0.1:8786", 0, 90.0)),
        ("dask://[::1]:8786/", Address("tcp://[::1]:8786", 0, 10.0)),
    ],
)
def test_url_says_which_scheduler(url: str, address: Address) -> None:
    assert parse(url) == address


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ray://box:1", "'ray://box:1' is no executor"),
        ("dask://box", "a host and a port are needed"),
        ("dask://box:70000", "a host and a port are needed"),
        ("dask://box:1?workers=2", "unknown word 'workers'"),
        ("dask://local?workers=none", "'none' is not a number"),
        ("dask://local?workers=0", "'0' is not a number of 1 or more"),
    ],
)
def test_wrong_url_is_a_mistake_that_is_explained(url: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(url)
    assert told in caught.value.message


def test_worker_that_has_everything_lacks_nothing() -> None:
    sdk = {"version": "2"}
    rich = offer(4, 8 * GIB, 1, licences={"bonded": 1}, toolchains={"sdk": sdk, "ndk": {"r": 26}})
    asked = order(claim(4, 8 * GIB, 1, "bonded"), rich.processor, sdk=sdk)
    assert lacking(needs_of(asked), rich) == []
    both = order(claim(), None, **{"sdk+ndk": {"sdk": sdk, "ndk": {"r": 26}}})
    assert lacking(needs_of(both), rich) == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (order(claim(3)), "3 cpu (it has 2)"),
        (order(claim(1, 6 * GIB)), "6.0 GiB of memory (it has 4.0)"),
        (order(claim(1, 0, 1)), "1 gpu (it has 0)"),
        (order(claim(1, 0, 0, "bonded")), "licence bonded"),
        (order(claim(), None, sdk=[2]), "toolchain 'sdk' (another version is there)"),
        (order(claim(), None, ndk=[2]), "toolchain 'ndk' (it is not there)"),
        (order(claim(), "riscv64"), "a processor of the class that the step's key says"),
    ],
)
def test_what_a_worker_lacks_is_told_in_words(asked: Order, told: str) -> None:
    poor = offer(toolchains={"sdk": [1]})
    needs = needs_of(asked)
    assert [in_words(each, needs[each], poor) for each in lacking(needs, poor)] == [told]


def test_claim_that_is_larger_than_every_worker_takes_all_of_the_largest() -> None:
    offers = {"a": offer(2, 4 * GIB), "b": offer(8, 2 * GIB), "c": offer(99, 99 * GIB)}
    offers["c"] = offers["c"]._replace(system="plan9 mips")
    cut = cut_to_fit(needs_of(order(claim(16, 64 * GIB))), offers)
    assert (cut[CPU], cut[MEMORY]) == (8, 4 * GIB)
    small = needs_of(order(claim(1, GIB)))
    assert cut_to_fit(small, offers) == small


def test_step_of_ours_never_fits_a_worker_that_is_not_ours() -> None:
    """Whatever a step asks for, some of it only `qbuild worker` has."""
    names = needs_of(order(claim())).keys()
    assert names
    assert names <= resources_of(offer()).keys()


def test_one_fingerprint_is_taken_the_same_each_time() -> None:
    assert agreed("own", ["a", "own", "a"]) == "own"
    assert agreed(None, ["b", "a", "a"]) == "a"
    assert agreed(None, ["b", "a"]) == agreed(None, ["a", "b"])


def test_machine_of_a_build_has_what_workers_have() -> None:
    here = Machine(
        versions=dict,
        toolchains={"mine": 1, "both": 1},
        processor="here",
        gpus=0,
        template=str,
        missing={"theirs": "not here", "nobody's": "get it there"},
        fields={"mine": {"root": "/x"}},
    )
    workers = {
        "a": offer(gpus=1, toolchains={"theirs": 5, "both": 2}, processor="there"),
        "b": offer(gpus=2, toolchains={"both": 1}, processor="there"),
    }
    merged = as_workers_have(here, workers)
    assert merged.toolchains == {"theirs": 5, "both": 1}
    assert merged.missing == {"mine": "no worker has it", "nobody's": "get it there"}
    assert (merged.processor, merged.gpus) == ("there", 2)
