"""A shop in a temporary folder, whose rule modules can be imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.answering_shop import Workshop
from tests.engine.shop import Shop, forget_modules


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Shop(tmp_path)
    forget_modules()


@pytest.fixture
def chain(shop: Shop) -> Shop:
    """src -> a -> b -> c, and src -> d."""
    shop.source("src", "one\n")
    shop.step("a", "src", options={"text": "A"})
    shop.step("b", "a", options={"text": "B"})
    shop.step("c", "b", options={"text": "C"})
    shop.step("d", "src", options={"text": "D"})
    return shop


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield Workshop(tmp_path)
    forget_modules()
