"""What a step reads is changed and changed back while it runs: its digests say nothing of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from buildsys.engine.stamps import stamp_of
from buildsys.store.local import LINKED
from tests.engine.shop import Action, Shop, concatenate


class Killed(BaseException):
    """As a SIGKILL: nothing of qbuild's runs after it."""


def until_it_shows(path: Path, change: Callable[[], None]) -> None:
    """Do it until the stamp is another one: within a tick of the clock it stays."""
    before = stamp_of(path.lstat())
    change()
    while stamp_of(path.lstat()) == before:
        change()


def in_between(change: Callable[[], None]) -> Action:
    """An action that does something to files while its step runs."""

    def act(order: Order) -> None:
        change()
        concatenate(order)

    return act


def there_and_back(path: Path) -> Callable[[], None]:
    """Write something else, and then the old bytes with the old times."""

    def change() -> None:
        found, content = path.stat(), path.read_bytes()

        def write() -> None:
            path.write_text("else")
            path.write_bytes(content)
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

        until_it_shows(path, write)

    return change


def assert_refused_once(shop: Shop, step: str, name: str) -> None:
    """The step is not kept, is told why, and is made the next time."""
    built = shop.build()
    assert f"{name} was written or touched, though it holds the same now" in built.failures[step]
    assert "changed while the step ran, so nothing of it was kept" in built.failures[step]
    assert not (shop.build_root / step).exists()
    shop.actions.clear()
    again = shop.build()
    assert step in again.ran
    assert not again.failures
    assert shop.build().ran == []


def test_source_that_is_changed_and_changed_back_while_its_step_runs(chain: Shop) -> None:
    source = chain.root / "src.txt"
    chain.actions["a"] = in_between(there_and_back(source))
    assert_refused_once(chain, "a", str(source))


def test_source_that_is_replaced_and_put_back(chain: Shop) -> None:
    source = chain.root / "src.txt"

    def change() -> None:
        source.rename(chain.root / "aside")
        source.write_text("else")
        (chain.root / "aside").replace(source)

    chain.actions["a"] = in_between(lambda: until_it_shows(source, change))
    assert_refused_once(chain, "a", str(source))


def test_link_that_leads_elsewhere_for_a_while(chain: Shop) -> None:
    source = chain.root / "src.txt"
    source.rename(chain.root / "real")
    source.symlink_to("real")
    (chain.root / "other").write_text("else")

    def change() -> None:
        for target in ("other", "real"):
            (chain.root / "next").symlink_to(target)
            (chain.root / "next").replace(source)

    chain.actions["a"] = in_between(lambda: until_it_shows(source, change))
    assert_refused_once(chain, "a", str(source))


@pytest.mark.parametrize("chained", [False, True])
def test_link_above_a_source_that_leads_elsewhere_for_a_while(chain: Shop, chained: bool) -> None:
    """As "current", which leads to a release; chained: by way of another link."""
    for name in ("old", "new"):
        (chain.root / name).mkdir()
        (chain.root / name / "src.txt").write_text(name)
    first, link = chain.root / "first", chain.root / "current"
    link.symlink_to("old")
    first.symlink_to("current")
    way = first if chained else link
    chain.sources["src"] = chain.sources["src"]._replace(paths={"path": f"{way}/src.txt"})

    def change() -> None:
        for target in ("new", "old"):
            (chain.root / "next").symlink_to(target)
            (chain.root / "next").replace(link)

    chain.actions["a"] = in_between(lambda: until_it_shows(link, change))
    assert_refused_once(chain, "a", str(link))


def test_file_that_is_in_a_source_folder_for_a_while(shop: Shop) -> None:
    folder = shop.source("pictures", kind="folder")
    folder.mkdir()
    (folder / "1").write_text("one")

    def change() -> None:
        (folder / "2").write_text("two")
        (folder / "2").unlink()

    shop.step("a", "pictures")
    shop.actions["a"] = in_between(lambda: until_it_shows(folder, change))
    assert_refused_once(shop, "a", str(folder))


def test_artifact_that_is_edited_and_put_back_while_another_step_reads_it(chain: Shop) -> None:
    chain.actions["b"] = in_between(there_and_back(chain.build_root / "a"))
    assert_refused_once(chain, "b", "a")


def read_folder(shop: Shop) -> Path:
    """f/ -> b, and f/ is there; its place."""

    def make(order: Order) -> None:
        deep = Path(order.context["outputs"]["out"]) / "deep"
        deep.mkdir(parents=True)
        (deep / "x").write_text("x")

    shop.source("src", "one\n")
    shop.step("f/", "src")
    shop.step("b", "f/")
    shop.actions["f/"] = make
    shop.build("f/")
    return shop.build_root / "f"


def test_file_that_is_in_an_artifacts_folder_for_a_while(shop: Shop) -> None:
    deep = read_folder(shop) / "deep"

    def change() -> None:
        (deep / "y").write_text("else")
        (deep / "y").unlink()

    shop.actions["b"] = in_between(lambda: until_it_shows(deep, change))
    assert_refused_once(shop, "b", "f/deep")


def test_artifacts_folder_that_is_another_for_a_while(shop: Shop) -> None:
    folder = read_folder(shop)

    def change() -> None:
        folder.rename(shop.root / "aside")
        folder.mkdir()
        folder.rmdir()
        (shop.root / "aside").rename(folder)

    shop.actions["b"] = in_between(lambda: until_it_shows(folder, change))
    assert_refused_once(shop, "b", "f/")


def test_artifact_of_an_earlier_build_is_watched_as_well(chain: Shop) -> None:
    chain.build()
    chain.edit("b", text="another")
    chain.actions["b"] = in_between(there_and_back(chain.build_root / "a"))
    built = chain.build()
    assert "a was written or touched" in built.failures["b"]
    assert chain.read("b") == "one\nAB"


def test_what_others_read_may_move(chain: Shop) -> None:
    """d reads src; b does not."""
    chain.actions["b"] = in_between(there_and_back(chain.root / "src.txt"))
    built = chain.build()
    assert "b" not in built.failures


@pytest.mark.parametrize("size", [LINKED, LINKED - 1])
def test_only_what_the_store_shares_may_be_linked_while_a_step_reads_it(
    chain: Shop, size: int
) -> None:
    """A link changes the ctime, and large artifacts are linked by stores at any time."""
    artifact = chain.build_root / "a"
    chain.edit("a", text="x" * (size - len("one\n")))

    def change() -> None:
        os.link(artifact, chain.root / "linked")
        (chain.root / "linked").unlink()

    chain.actions["b"] = in_between(lambda: until_it_shows(artifact, change))
    built = chain.build()
    assert artifact.stat().st_size == size
    assert ("b" in built.failures) == (size < LINKED)


@pytest.mark.parametrize("edits", [False, True])
def test_kept_work_of_a_killed_run_counts_only_if_nothing_was_touched(
    chain: Shop, edits: bool
) -> None:
    source = chain.root / "src.txt"
    chain.resumable = True
    found: list[list[str]] = []

    def act(order: Order) -> None:
        kept = Path(order.context["kept"])
        found.append(sorted(each.name for each in kept.iterdir()))
        (kept / "half").write_bytes(source.read_bytes())
        if len(found) == 1:
            if edits:
                there_and_back(source)()
            raise Killed
        concatenate(order)

    chain.actions["a"] = act
    with pytest.raises(Killed):
        chain.build("a")
    chain.build("a")
    assert found == [[], [] if edits else ["half"]]


def test_kept_work_outlives_a_copy_of_its_stamps_only(chain: Shop) -> None:
    """A copied project has other inodes: it begins anew, and believes nothing."""
    chain.resumable = True
    found: list[list[str]] = []

    def act(order: Order) -> None:
        kept = Path(order.context["kept"])
        found.append(sorted(each.name for each in kept.iterdir()))
        (kept / "half").write_text("half")
        raise Killed

    chain.actions["a"] = act
    for _ in range(2):
        with pytest.raises(Killed):
            chain.build("a")
    source = chain.root / "src.txt"
    shutil.copy2(source, chain.root / "copy")
    (chain.root / "copy").replace(source)
    with pytest.raises(Killed):
        chain.build("a")
    assert found == [[], ["half"], []]
