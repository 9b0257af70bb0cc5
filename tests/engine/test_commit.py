"""What is written to an output as soon as it has its place is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from tests.engine.shop import Shop, concatenate

HOUR_NS = 3600 * 10**9


def concatenate_an_hour_ago(order: Order) -> None:
    """As a step does that has long finished its output when it ends."""
    concatenate(order)
    for path in order.context["outputs"].values():
        found = Path(path).stat()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - HOUR_NS))


def overwrite_once(path: Path, point: str, *, touches: bool) -> Callable[[str], None]:
    """At a point between two operations, write to a file; touches: and set its times back."""
    waiting = [point]

    def at(here: str) -> None:
        if waiting == [here]:
            waiting.clear()
            found = path.stat()
            path.write_text("bad\n")
            if touches:
                os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    return at


@pytest.mark.parametrize("touches", [False, True])
@pytest.mark.parametrize("point", ["renamed a", "done written", "done durable"])
def test_output_that_is_overwritten_while_it_is_committed_is_neither_kept_nor_read(
    chain: Shop, point: str, touches: bool
) -> None:
    chain.actions["a"] = concatenate_an_hour_ago
    at = overwrite_once(chain.build_root / "a", point, touches=touches)
    built = chain.build(at=at)
    assert "a was changed by hand" in built.failures["b"]
    assert chain.build().ran[0] == "a"
    assert (chain.read("a"), chain.read("b")) == ("one\nA", "one\nAB")
    assert chain.build().outcome is None


def test_file_in_a_folder_that_is_overwritten_while_that_is_committed(chain: Shop) -> None:
    def make_folder(order: Order) -> None:
        folder = Path(order.context["outputs"]["out"])
        folder.mkdir()
        order.context["outputs"]["out"] = str(folder / "f")
        concatenate_an_hour_ago(order)

    chain.step("f/", "src")
    chain.step("g", "f/")
    chain.actions["f/"] = make_folder
    at = overwrite_once(chain.build_root / "f/f", "done written", touches=True)
    built = chain.build("g", at=at)
    assert "f/ was changed by hand" in built.failures["g"]
    assert not chain.build("g").failures
    assert chain.read("g") == "one\n"
