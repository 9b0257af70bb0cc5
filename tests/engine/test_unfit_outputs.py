"""What a step leaves that can be no output is named, and nothing of it is put in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from tests.engine.shop import Shop, concatenate


def out(order: Order) -> Path:
    return Path(order.context["outputs"]["out"])


def missing(order: Order) -> None:
    """Writes nothing."""


def link(order: Order) -> None:
    out(order).symlink_to("/etc/hostname")


def folder(order: Order) -> None:
    out(order).mkdir()


def pipe(order: Order) -> None:
    os.mkfifo(out(order))


def folder_with_a_link(order: Order) -> None:
    out(order).mkdir()
    (out(order) / "name").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("name", "action", "message"),
    [
        ("a", missing, "did not make a"),
        ("a", link, "the step made a link"),
        ("a", folder, "should be a file"),
        ("a", pipe, "should be a file"),
        ("a/", folder, "left a/ empty"),
        ("a/", concatenate, "should be a folder"),
        ("a/", folder_with_a_link, "name is a link"),
    ],
)
def test_what_cannot_be_an_output_is_named_and_refused(
    shop: Shop, name: str, action: Callable[[Order], None], message: str
) -> None:
    shop.source("src", "x")
    shop.step(name, "src")
    shop.actions[name] = action
    assert message in shop.build().failures[name]
    assert not (shop.build_root / "a").exists()


def test_output_is_not_written_through_a_link(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    shop.source("src", "x")
    shop.step("sub/a", "src")
    shop.build_root.mkdir()
    (shop.build_root / "sub").symlink_to(tmp_path / "outside")
    assert "is a link" in shop.build().failures["sub/a"]
    assert not list((tmp_path / "outside").iterdir())
