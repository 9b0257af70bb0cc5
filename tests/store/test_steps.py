"""The engine and the store: what was made before is not made again, and is what it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buildsys.cli.cache import keys_in_use
from buildsys.engine import storing
from buildsys.engine.executor import Order
from buildsys.engine.journal import encode
from buildsys.engine.stamps import Stamps
from buildsys.engine.storing import StepCache
from buildsys.errors import QbuildError
from buildsys.store import blob_stamps
from buildsys.store.actions import Action, Entry
from buildsys.store.garbage import collect
from buildsys.store.local import Store
from buildsys.store.remote import Remote
from tests.engine.shop import InProcess, Shop, forget_modules
from tests.store.conftest import KEY, LARGE, key_of, put, restored
from tests.store.servers import WebServer
from tests.store.test_local import flip

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def shop(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """src -> a -> b (a folder) -> c; a is large. Its steps are quick, and stored all the same."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(storing, "QUICK", 0.0)
    shop = Shop(tmp_path)
    shop.source("src", "one\n")
    shop.step("a", "src", options={"text": "A" * LARGE})
    shop.step("b/", "a")
    shop.step("c", "b/", options={"text": "C"})
    shop.actions["b/"] = make_folder
    use(shop, store)
    yield shop
    forget_modules()


def make_folder(order: Order) -> None:
    folder = Path(order.context["outputs"]["out"])
    (folder / "empty").mkdir(parents=True)
    (folder / "f").write_text("from b\n")
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)


def use(shop: Shop, store: Store, url: str | None = None, forced: tuple[str, ...] = ()) -> None:
    def remote(warn: Callable[[str], None]) -> Remote:
        return Remote(str(url), KEY, store, warn)

    shop.cache = lambda folder, stamps, say: StepCache(
        store, folder, stamps, say, forced, None if url is None else remote
    )


def tree(root: Path) -> dict[str, tuple[bytes | None, bool]]:
    """Every path below a build folder: its bytes (None: a folder), and whether it runs."""
    found = {}
    for path in root.rglob("*"):
        if ".qbuild" not in path.parts:
            content = path.read_bytes() if path.is_file() else None
            runs = path.is_file() and os.access(path, os.X_OK)
            found[str(path.relative_to(root))] = (content, runs)
    return found


def elsewhere(shop: Shop, name: str = "second") -> Path:
    shop.build_root = shop.root / name
    return shop.build_root


def test_second_build_folder_gets_everything_and_runs_nothing(shop: Shop) -> None:
    assert shop.build().ran == ["a", "b/", "c"]
    before = tree(shop.build_root)
    second = elsewhere(shop)
    built = shop.build()
    assert built.ran == []
    assert built.outcome is not None
    assert built.outcome.restored == ("a", "b/", "c")
    assert built.outcome.made == ()
    assert tree(second) == before
    assert shop.build().outcome is None
    assert [line for line in built.said if "(from the store)" in line] != []


def test_output_that_is_overwritten_while_it_is_committed_does_not_reach_the_store(
    shop: Shop,
) -> None:
    """A large one is not read again to be stored."""

    def at(point: str) -> None:
        if point == "done written":
            (shop.build_root / "a").write_bytes(b"X" * (len("one\n") + LARGE))

    shop.build("a", at=at)
    elsewhere(shop)
    shop.build("a")
    assert shop.read("a") == "one\n" + "A" * LARGE


def test_removed_and_edited_outputs_are_restored(shop: Shop) -> None:
    shop.build()
    before = tree(shop.build_root)
    (shop.build_root / "c").write_text("by hand")
    (shop.build_root / "b/f").unlink()
    assert shop.build().ran == []
    assert tree(shop.build_root) == before


def test_earlier_state_of_the_recipe_is_restored(shop: Shop) -> None:
    shop.build()
    shop.edit("c", text="other")
    assert shop.build().ran == ["c"]
    shop.edit("c", text="C")
    assert shop.build().ran == []
    assert shop.read("c").endswith("C")


@pytest.mark.parametrize("name", ["a", "c", "b/f", "b/run"])
def test_flipped_bit_in_the_store_is_found_and_the_step_runs(
    shop: Shop, store: Store, name: str
) -> None:
    first = shop.build()
    before = tree(shop.build_root)
    digest = first.scene.stamps.file(name, follow=False)
    assert digest is not None
    (shop.build_root / name).unlink()  # it may be the same inode
    flip(store.blob(digest), quietly=True)
    maker = "b/" if name.startswith("b/") else name
    elsewhere(shop)
    assert shop.build().ran == [maker]
    assert tree(shop.build_root) == before
    elsewhere(shop, "third")
    assert shop.build().ran == []
    assert tree(shop.build_root) == before


def test_forced_step_runs_though_it_is_in_the_store(shop: Shop, store: Store) -> None:
    shop.build()
    use(shop, store, forced=("b/",))
    assert shop.build(forced=("b/",)).ran == ["b/"]


def test_quick_steps_are_not_kept(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "QUICK", 1.0)
    shop.build()
    assert store.records() == []
    elsewhere(shop)
    assert shop.build().ran == ["a", "b/", "c"]


def test_temporary_artifact_comes_from_the_store_when_it_is_needed_again(shop: Shop) -> None:
    shop.steps["a"] = shop.steps["a"]._replace(temporary=True)
    assert shop.build().ran == ["a", "b/", "c"]
    assert not (shop.build_root / "a").exists()
    shop.step("d", "a", options={"text": "D"})
    assert shop.build().ran == ["d"]
    assert shop.read("d") == "one\n" + "A" * LARGE + "D"


def test_warnings_of_a_run_are_said_again_when_it_is_restored(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = InProcess.poll

    def warning(executor: InProcess, timeout: float) -> list[object]:
        said = {"notes": {"fallback": 3}, "warnings": ("3 rows fell back to Q8_0",)}
        return [event._replace(**said) for event in poll(executor, timeout)]

    monkeypatch.setattr(InProcess, "poll", warning)
    shop.build()
    elsewhere(shop)
    built = shop.build()
    assert built.ran == []
    assert "c: warning: 3 rows fell back to Q8_0" in built.said
    assert built.scene.entries.done["c"]["notes"] == {"fallback": 3}


def test_kill_while_outputs_are_restored_leaves_nothing_half(shop: Shop) -> None:
    shop.build()
    before = tree(shop.build_root)
    second = elsewhere(shop)
    pid = os.fork()
    if pid == 0:
        take, taken = Store._take, []

        def and_die(store: Store, entry: Entry, target: str) -> bool:
            taken.append(entry)
            if len(taken) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(store, entry, target)

        Store._take = and_die  # type: ignore[method-assign]  # in the child only
        shop.build()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert shop.build().ran == []
    assert tree(second) == before
    assert os.listdir(second / ".qbuild/staging") == []


def test_store_that_fails_costs_a_warning_and_no_build(shop: Shop, store: Store) -> None:
    """A file in the place of a folder stands for whatever a disk may say."""
    (Path(store.root) / "cas/b3").rmdir()
    (Path(store.root) / "cas/b3").write_text("")
    built = shop.build()
    assert built.ran == ["a", "b/", "c"]
    assert built.failures == {}
    assert sum("takes nothing" in line for line in built.said) == 1


def test_output_is_not_read_again_when_another_folder_links_its_blob(
    tmp_path: Path, store: Store
) -> None:
    """A clock ten seconds ahead makes the stamps trusted at once."""
    path = tmp_path / "build/a"
    path.parent.mkdir()
    path.write_bytes(b"x" * LARGE)
    digest = Stamps(str(path.parent), "").file("a", follow=False)
    assert digest is not None
    entry = Entry("a", digest, LARGE, False)
    store.link_in(str(path), entry)

    def stamps() -> Stamps:
        return Stamps(
            str(path.parent),
            str(tmp_path / "stamps"),
            clock_ns=lambda: os.stat(path).st_ctime_ns + 10**10,
            vouched=lambda digest, stamp: blob_stamps.vouches(store.root, digest, stamp),
        )

    first = stamps()
    assert (first.file("a", follow=False), first.hashed) == (digest, ["a"])
    first.save()
    assert store._take(entry, str(tmp_path / "second"))
    again = stamps()
    assert (again.file("a", follow=False), again.hashed) == (digest, [])
    flip(str(path), quietly=True)
    changed = stamps()
    assert changed.file("a", follow=False) != digest


def test_gc_keeps_what_a_build_folder_uses(shop: Shop, store: Store) -> None:
    shop.build()
    first, used = shop.build_root, set(store.records())
    elsewhere(shop)
    shop.edit("c", text="other")
    shop.build()
    unused = set(store.records()) - used
    assert len(unused) == 1
    now = os.stat(store.root).st_mtime + 100 * DAY
    second = shop.build_root
    for name in ("c", "a"):
        (second / name).unlink()
    (second / ".qbuild/journal").unlink()
    gone = collect(store, keys_in_use, 30 * DAY, None, now)
    assert (gone.records, set(store.records())) == (1, used)
    shop.build_root = first
    for name in ("a", "c"):
        (first / name).unlink()
    shop.edit("c", text="C")
    assert shop.build().ran == []


def test_gc_spares_what_is_used_while_it_looks_around(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One build restores an old record, and another makes again what old blobs hold, after gc
    has listed both as old and unused."""
    large = b"x" * LARGE
    for word, files in {"old": {"f": b"1" * 1000}, "other": {"f": b"2" * 1000, "g": large}}.items():
        put(store, tmp_path / word, word, files)
        os.utime(f"{store.root}/ac/{key_of(word)}", (0, 0))
    twin, read = Store(store.root), store.action

    def and_meanwhile(key: str) -> Action | None:
        """gc reads a record, after it has listed them all."""
        monkeypatch.setattr(store, "action", read)
        assert restored(twin, tmp_path / "restored", "old") is not None
        put(twin, tmp_path / "made", "new", {"h": b"2" * 1000, "i": large})
        return read(key)

    monkeypatch.setattr(store, "action", and_meanwhile)
    collect(store, lambda folder: (), 30 * DAY, None)
    assert set(store.records()) == {key_of("old"), key_of("new")}
    assert restored(store, tmp_path / "again", "old") is not None
    assert restored(store, tmp_path / "once more", "new") is not None


def test_gc_to_a_size_takes_the_least_recently_used_and_spares_the_last_hour(
    tmp_path: Path, store: Store
) -> None:
    for number in range(5):
        put(store, tmp_path / str(number), f"step{number}", {"f": bytes([number]) * 1000})
        path = f"{store.root}/ac/{key_of(f'step{number}')}"
        os.utime(path, (number * HOUR, number * HOUR))
    now = 2e9
    kept = collect(store, lambda folder: (), None, 2500, 4.5 * HOUR)
    assert (kept.records, kept.blobs) == (3, 0)  # the blobs are new: somebody may be at them
    left = {key_of("step3"), key_of("step4")}
    assert set(store.records()) == left
    swept = collect(store, lambda folder: (), None, None, now)
    assert (swept.records, swept.blobs, swept.size) == (0, 3, 3000)
    collect(store, lambda folder: (), None, 0, 4.5 * HOUR)
    assert store.records() == [key_of("step4")]


def test_gc_removes_nothing_where_it_cannot_tell_what_is_used(shop: Shop, store: Store) -> None:
    shop.build()
    journal = shop.build_root / ".qbuild/journal"
    journal.write_bytes(encode({"v": 99, "kind": "done", "step": "a"}))
    with pytest.raises(QbuildError, match="nothing was removed"):
        collect(store, keys_in_use, 0.0, 0, 4e9)
    assert len(store.records()) == 3


def test_gc_in_the_middle_of_a_build_makes_steps_run(shop: Shop, store: Store) -> None:
    shop.build()
    elsewhere(shop)

    def everything_goes(point: str) -> None:
        if point == "done durable":
            collect(store, lambda folder: (), 0.0, 0, 4e9)

    built = shop.build(at=everything_goes)
    assert built.ran == ["b/", "c"]
    assert built.failures == {}


def test_machine_with_an_empty_store_gets_everything_from_the_shared_cache(
    shop: Shop, store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "QUICK", 1.0)  # what is shared is shared however quick
    use(shop, store, url)
    assert shop.build().ran == ["a", "b/", "c"]
    before = tree(shop.build_root)
    second = elsewhere(shop)
    use(shop, Store(str(tmp_path / "other-store")), url)
    built = shop.build()
    assert built.ran == []
    assert built.outcome is not None
    assert built.outcome.restored == ("a", "b/", "c")
    assert tree(second) == before


def test_dead_cache_fails_nothing(shop: Shop, store: Store, web: WebServer) -> None:
    web.stop()
    use(shop, store, web.url)
    built = shop.build()
    assert built.ran == ["a", "b/", "c"]
    assert [line for line in built.said if line.startswith("warning")] == [
        line for line in built.said if "cannot be used" in line
    ]
    assert sum("cannot be used" in line for line in built.said) == 1
