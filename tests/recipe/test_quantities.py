"""Amounts mean what their unit says."""

from __future__ import annotations

import re

import pytest

from buildsys.recipe.quantities import BYTES_PATTERN, SECONDS_PATTERN, memory_bytes, seconds


@pytest.mark.parametrize(
    ("text", "amount"),
    [("4GiB", 4294967296), ("1.5 KiB", 1536), ("500MB", 500_000_000), ("7B", 7), (1024, 1024)],
)
def test_memory(text: str | int, amount: int) -> None:
    assert memory_bytes(text) == amount
    assert isinstance(text, int) or re.search(BYTES_PATTERN, text)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("600s", 600.0), ("10m", 600.0), ("1.5h", 5400.0), (3, 3.0), ("2 d", 172800.0)],
)
def test_time(text: str | int, amount: float) -> None:
    assert seconds(text) == amount
    assert isinstance(text, int) or re.search(SECONDS_PATTERN, text)


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 gigs", "4GiB4", "1e3MB", True])
def test_what_is_no_memory_is_refused(text: str | bool) -> None:
    with pytest.raises(ValueError, match=r"not (an amount|one of the units)"):
        memory_bytes(text)


@pytest.mark.parametrize("text", ["0s", "soon", "10 minutes", "-1s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not (an amount|one of the units)|longer than nothing"):
        seconds(text)
