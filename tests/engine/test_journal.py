"""The journal does not grow for ever, and a kill while it is rewritten loses nothing."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buildsys.engine.journal import CROWD, FEW, Journal, encode, read_journal
from tests.engine.shop import Shop
from tests.engine.test_faults import in_child

CALLS = ("open", "fsync", "replace", "link", "unlink", "ftruncate", "write", "pwrite")


def said(path: Path) -> object:
    """All that a journal says: of what is done, also what few read, and what is interrupted."""
    entries = read_journal(str(path))
    assert entries.damaged == ()
    whole = {step: (line.get("why"), dict(line)) for step, line in entries.done.items()}
    return whole, {step: dict(line) for step, line in entries.open.items()}


@pytest.fixture
def crowded(chain: Shop) -> Path:
    """A journal of which most lines no longer count: one step is interrupted over an older
    state of it, and one is forgotten."""
    chain.build()
    path = chain.build_root / ".qbuild/journal"
    lines = path.read_bytes()
    forgotten = encode({"kind": "done", "step": "gone"}) + encode(
        {"kind": "forget", "step": "gone"}
    )
    copies = FEW // 8 + CROWD
    intent = encode({"kind": "intent", "step": "b", "outputs": ["b"]})
    path.write_bytes(forgotten + lines * copies + intent)
    assert read_journal(str(path)).crowded
    return path


def test_journal_of_many_rebuilds_stays_short_and_says_the_same(chain: Shop) -> None:
    chain.build()
    path = chain.build_root / ".qbuild/journal"
    longest = 0
    for number in range(FEW):
        chain.edit("d", text=str(number))
        assert chain.build().ran == ["d"]
        longest = max(longest, path.read_bytes().count(b"\n"))
    assert longest <= FEW + CROWD * len(chain.steps) + 2
    assert path.read_bytes().count(b"\n") < longest
    assert chain.build().ran == []


def test_rewritten_journal_says_the_same(crowded: Path) -> None:
    before = said(crowded)
    Journal(str(crowded), read_journal(str(crowded))).close()
    assert crowded.read_bytes().count(b"\n") == 5  # four steps, and one intent
    assert said(crowded) == before


def test_torn_end_of_a_crowded_journal_is_left_out(crowded: Path) -> None:
    before = said(crowded)
    with crowded.open("ab") as file:
        file.write(b'12345678 {"v":1,"kind":"done","st')
    journal = Journal(str(crowded), read_journal(str(crowded)))
    assert said(crowded) == before
    journal.append([{"kind": "forget", "step": "d"}])
    journal.close()
    assert "d" not in read_journal(str(crowded)).done


def test_kill_at_every_instant_of_a_rewrite_loses_nothing(crowded: Path) -> None:
    before, whole = said(crowded), crowded.read_bytes()
    number, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        number += 1
        crowded.write_bytes(whole)

        def rewrite(left: int = number) -> None:
            die_before_call(left)
            Journal(str(crowded), read_journal(str(crowded))).close()

        status = in_child(rewrite)
        assert said(crowded) == before
    assert status == 0
    assert number > 5  # open, fsync, replace, open, fsync, open ...
    assert crowded.read_bytes().count(b"\n") == 5


def die_before_call(left: int) -> None:
    """In a child: SIGKILL instead of the call of this number to what changes files."""

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)
