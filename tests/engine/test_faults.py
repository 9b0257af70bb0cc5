"""Kill it anywhere, run it again: the bytes of an undisturbed build, no finished step redone."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from buildsys.engine.journal import Entries, JournalError, encode, read_journal
from tests.engine.shop import Failed, Shop, concatenate

KILLED = 9


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(shop: Shop, point: str, step: str) -> int:
    """Build in a process that dies at a point of the commit of `step`."""
    reached = []

    def at(name: str) -> None:
        reached.append(name)
        if name == point and started[-1] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    started: list[str] = []
    for name in shop.steps:
        shop.actions[name] = noting(started, shop.actions.get(name, concatenate))
    status = in_child(lambda: shop.build(at=at))
    shop.actions.clear()
    return status


def noting(started: list[str], action: Callable[[Order], None]) -> Callable[[Order], None]:
    def run(order: Order) -> None:
        started.append(order.id)
        action(order)

    return run


def out(order: Order) -> Path:
    return Path(order.context["outputs"]["out"])


def contents(shop: Shop) -> dict[str, str]:
    files = (path for path in shop.build_root.rglob("*") if path.is_file())
    own = shop.build_root / ".qbuild"
    return {
        str(path.relative_to(shop.build_root)): path.read_text()
        for path in files
        if own not in path.parents
    }


def staging(shop: Shop) -> list[Path]:
    return list((shop.build_root / ".qbuild/staging").iterdir())


@pytest.fixture
def pair(shop: Shop) -> Shop:
    """src -> a -> (b, with a second output, and a folder) -> c."""
    shop.source("src", "one\n")
    shop.step("a", "src", options={"text": "A"})
    shop.step("b", "a", options={"text": "B"}, outputs={"extra": "b.extra"})
    shop.step("c", "b", "b.extra", options={"text": "C"})
    return shop


@pytest.mark.parametrize(
    "point",
    ["intent written", "intent durable", "renamed b", "renamed b.extra", "done written"],
)
@pytest.mark.parametrize("again", [False, True], ids=["first build", "rebuild"])
def test_kill_between_any_two_operations_of_a_commit(pair: Shop, point: str, again: bool) -> None:
    if again:
        pair.build()
        pair.edit("b", text="X")
    assert kill_at(pair, point, "b") == -signal.SIGKILL
    rest = pair.build().ran
    done = point == "done written"  # the line is whole: the step is finished
    assert rest == (["c"] if done else ["b", "c"])
    text = "X" if again else "B"
    assert contents(pair) == {
        "a": "one\nA",
        "b": f"one\nA{text}",
        "b.extra": f"one\nA{text}",
        "c": f"one\nA{text}one\nA{text}C",
    }
    assert pair.build().ran == []


def test_interrupted_commit_is_stale_for_readers(pair: Shop) -> None:
    pair.build()
    pair.edit("b", text="X")
    kill_at(pair, "renamed b", "b")
    assert pair.why("b") == ["putting its outputs in place was interrupted"]


def test_two_outputs_are_never_taken_from_two_builds(pair: Shop) -> None:
    """New b beside old b.extra, and then the option goes back to what it was."""
    pair.build()
    pair.edit("b", text="X")
    kill_at(pair, "renamed b", "b")
    pair.edit("b", text="B")
    assert pair.build().ran == ["b"]
    assert contents(pair)["b"] == contents(pair)["b.extra"] == "one\nAB"


def test_no_staging_is_left_after_the_next_run(pair: Shop) -> None:
    kill_at(pair, "intent written", "b")
    assert staging(pair)
    pair.build()
    assert not staging(pair)


def test_journal_cut_at_every_byte_of_its_last_line(pair: Shop) -> None:
    pair.build("b")
    before = {name: line["key"] for name, line in journal(pair).done.items()}
    path = pair.build_root / ".qbuild/journal"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    assert b'"kind":"done"' in whole[last:]
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        entries = read_journal(str(path))
        assert set(entries.done) == {"a"}
        assert (entries.whole, entries.damaged) == (last, ())
    path.write_bytes(whole[: last + 20])
    assert pair.build("b").ran == ["b"]
    assert {name: line["key"] for name, line in journal(pair).done.items()} == before
    assert pair.build("b").ran == []


def journal(shop: Shop) -> Entries:
    return read_journal(str(shop.build_root / ".qbuild/journal"))


def test_failing_step_leaves_no_output(pair: Shop) -> None:
    def half(order: Order) -> None:
        out(order).write_text("half")
        raise Failed("broken on purpose")

    pair.build()
    pair.edit("b", text="X")
    pair.actions["b"] = half
    built = pair.build()
    assert built.ran == ["b"]
    assert "broken on purpose" in built.failures["b"]
    assert contents(pair)["b"] == "one\nAB"
    del pair.actions["b"]
    assert pair.build().ran == ["b", "c"]


def test_without_k_a_failure_stops_the_build_and_with_k_the_rest_is_built(chain: Shop) -> None:
    def fail(order: Order) -> None:
        raise Failed("no")

    chain.actions["a"] = fail
    stopped = chain.build(jobs=1)
    assert stopped.ran == ["a"]
    assert stopped.outcome is not None
    assert stopped.outcome.blocked == ("b", "c")
    went_on = chain.build(jobs=1, keep_going=True)
    assert went_on.ran == ["a", "d"]
    assert went_on.outcome is not None
    assert went_on.outcome.blocked == ("b", "c")
    assert not (chain.build_root / "b").exists()


def test_input_edited_while_its_step_runs_is_not_committed(chain: Shop) -> None:
    source = chain.root / "src.txt"

    def edit(order: Order) -> None:
        concatenate(order)
        source.write_text("edited\n")

    chain.actions["d"] = edit
    built = chain.build("d")
    assert "changed while the step ran" in built.failures["d"]
    assert "content of src" in built.failures["d"]
    source.write_text("one\n")  # back to what it was when the step began
    del chain.actions["d"]
    assert chain.build("d").ran == ["d"]
    assert chain.read("d") == "one\nD"


def test_artifact_edited_while_its_reader_runs_is_not_believed(chain: Shop) -> None:
    def edit(order: Order) -> None:
        concatenate(order)
        (chain.build_root / "a").write_text("by hand")

    chain.actions["b"] = edit
    built = chain.build()
    assert "a was changed by hand" in built.failures["b"]
    del chain.actions["b"]
    built = chain.build()
    assert "a" in built.ran
    assert chain.read("c") == "one\nABC"


def test_undeclared_files_are_not_taken(chain: Shop) -> None:
    def more(order: Order) -> None:
        concatenate(order)
        Path(order.staging, "extra").write_text("undeclared")

    chain.actions["d"] = more
    chain.build("d")
    assert contents(chain) == {"d": "one\nD"}


def test_folder_replaces_folder_file_replaces_folder_and_back(shop: Shop) -> None:
    def tree(order: Order) -> None:
        (out(order) / "sub").mkdir(parents=True)
        (out(order) / "sub" / order.context["options"]["text"]).write_text("x")

    shop.source("src", "x")
    shop.actions["d/"] = tree
    for text in ("one", "two"):
        shop.step("d/", "src", options={"text": text})
        assert shop.build().ran == ["d/"]
        assert contents(shop) == {f"d/sub/{text}": "x"}
        assert shop.build().ran == []
    del shop.steps["d/"]
    shop.step("d", "src")
    shop.build()
    assert contents(shop) == {"d": "x"}
    del shop.steps["d"]
    shop.step("d/", "src", options={"text": "three"})
    shop.build()
    assert contents(shop) == {"d/sub/three": "x"}


class NoExchange:
    """A C library on a file system that cannot exchange two names."""

    def renameat2(self, *arguments: object) -> int:
        return -1


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_kill_where_a_folder_must_be_moved_aside_first(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed before the old one is moved, between the two renames, and never."""

    def tree(order: Order) -> None:
        out(order).mkdir()
        (out(order) / "f").write_text(order.context["options"]["text"])

    monkeypatch.setattr("buildsys.engine.commit._libc", NoExchange())
    shop.source("src", "x")
    shop.actions["d/"] = tree
    shop.step("d/", "src", options={"text": "one"})
    shop.build()
    shop.step("d/", "src", options={"text": "two"})
    rename, left = os.rename, [renames]

    def counted(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    def build() -> None:
        monkeypatch.setattr("buildsys.engine.commit.os.rename", counted)
        shop.build()

    assert in_child(build) == (0 if renames == 3 else -signal.SIGKILL)
    assert contents(shop) == [{"d/f": "one"}, {}, {"d/f": "two"}][renames - 1]
    assert shop.build().ran == ([] if renames == 3 else ["d/"])
    assert contents(shop) == {"d/f": "two"}
    assert not staging(shop)


def test_edit_inside_a_folder_artifact_rebuilds_it(shop: Shop) -> None:
    def tree(order: Order) -> None:
        out(order).mkdir()
        Path(order.context["outputs"]["out"], "f").write_text("made")

    shop.source("src", "x")
    shop.step("d/", "src")
    shop.actions["d/"] = tree
    shop.build()
    for spoil in (
        lambda: (shop.build_root / "d/f").write_text("edited"),
        lambda: (shop.build_root / "d/more").write_text("added"),
        lambda: (shop.build_root / "d/f").unlink(),
        lambda: (shop.build_root / "d/link").symlink_to("f"),
    ):
        spoil()
        assert shop.build().ran == ["d/"]
        assert contents(shop) == {"d/f": "made"}


def test_journal_of_a_newer_version_is_an_error(chain: Shop) -> None:
    chain.build()
    line = encode({"kind": "done", "step": "new"}).replace(b'{"v":1', b'{"v":2')
    text = line[9:-1]
    (chain.build_root / ".qbuild/journal").open("ab").write(b"%08x %s\n" % (zlib.crc32(text), text))
    with pytest.raises(JournalError, match="another version"):
        chain.build()


def test_damage_in_the_middle_costs_that_step_and_is_reported_once(chain: Shop) -> None:
    chain.build()
    path = chain.build_root / ".qbuild/journal"
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if b'"done","step":"a"' in line)
    lines[number] = lines[number].replace(b'"wall"', b'"well"')
    path.write_bytes(b"".join(lines))
    built = chain.build()
    assert built.said[0] == (
        f"warning: the journal is damaged (line {number + 1}); what it said of those steps is lost"
    )
    assert built.ran == ["a"]  # its bytes come out the same, so nothing else runs
    assert chain.build().said == []
    assert (chain.build_root / ".qbuild/journal.damaged").exists()


def test_full_disk_in_the_journal_keeps_what_was_done(
    chain: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal takes half a line, then no more."""
    chain.build("a")
    real, room = os.pwrite, [700]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        part = data[: room[0]]
        room[0] -= len(part)
        return real(fd, part, offset)

    with monkeypatch.context() as patch:
        patch.setattr("buildsys.engine.journal.os.pwrite", pwrite)
        with pytest.raises(JournalError, match="No space left"):
            chain.build()
    assert chain.build().ran[-1] in ("c", "d")
    assert chain.build().ran == []
