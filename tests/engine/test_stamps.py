"""Digests are remembered under stat, and only where stat can be believed."""

from __future__ import annotations

import os
from pathlib import Path

import blake3
import pytest

from buildsys.engine.digest import UnfitContent, folder_digest, source_entries
from buildsys.engine.stamps import Stamps, is_placed_late, stamp_of
from buildsys.errors import Location
from buildsys.identity import BLOCK, hash_file
from buildsys.plan.graph import Source

WHERE = Location("r.yaml", 1, 1, "")
SECOND = 1_000_000_000


def stamps_at(root: Path, after: float) -> Stamps:
    """Stamps whose clock says that `after` seconds have passed since the files were written."""
    newest = max(path.stat().st_ctime_ns for path in root.rglob("*"))
    return Stamps(str(root), str(root / "stamps"), lambda: newest + round(after * SECOND))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_digest_is_blake3_of_the_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "f").write_bytes(content[:size])
    assert hash_file(str(tmp_path / "f")) == blake3.blake3(content[:size]).hexdigest()


def test_settled_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    first = stamps_at(tmp_path, after=2.5)
    digest = first.file("f", follow=False)
    first.save()
    second = stamps_at(tmp_path, after=10)
    assert (second.file("f", follow=False), second.hashed) == (digest, [])


def test_file_younger_than_two_seconds_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    first = stamps_at(tmp_path, after=1.5)
    first.file("f", follow=False)
    first.save()
    second = stamps_at(tmp_path, after=10)
    second.file("f", follow=False)
    assert second.hashed == ["f"]


def test_file_from_the_future_is_read_again(tmp_path: Path) -> None:
    """The clock was set back: nothing is believed, and nothing breaks."""
    (tmp_path / "f").write_text("content")
    first = stamps_at(tmp_path, after=-3600)
    first.file("f", follow=False)
    first.save()
    assert not (tmp_path / "stamps").exists()


def test_touched_file_keeps_its_digest_and_is_remembered_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    first = stamps_at(tmp_path, after=5)
    digest = first.file("f", follow=False)
    first.save()
    os.utime(tmp_path / "f", (1, 1))
    second = stamps_at(tmp_path, after=5)
    assert (second.file("f", follow=False), second.hashed) == (digest, ["f"])
    second.save()
    third = stamps_at(tmp_path, after=6)
    third.file("f", follow=False)
    assert third.hashed == []


def test_one_stat_per_file_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("content")
    stamps = stamps_at(tmp_path, after=5)
    asked: list[str] = []
    real = os.stat

    def count(path: str, **options: bool) -> os.stat_result:
        asked.append(path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", count)
    for _ in range(3):
        stamps.file("f", follow=False)
        stamps.mode("f", follow=False)
    assert asked == [str(tmp_path / "f")]


@pytest.mark.parametrize(
    ("written", "placed", "known"),
    [
        (1_000_000_001, 1_060_000_001, True),
        (1_000_000_001, 1_040_000_001, False),
        (1_000_000_000, 2_000_000_000, False),  # a clock of whole seconds, as it seems
        (1_000_000_000, 3_000_000_000, True),
        (2_000_000_001, 1_000_000_001, False),  # the clock was set back
    ],
)
def test_output_is_known_without_reading_if_an_edit_must_leave_another_mtime(
    written: int, placed: int, known: bool
) -> None:
    assert is_placed_late((1, 2, 3, written, placed)) == known


def test_output_that_is_edited_as_soon_as_it_is_in_place_is_read_again(tmp_path: Path) -> None:
    """In place, and with its old size: the mtime tells."""
    (tmp_path / "f").write_text("content")
    hour_ago = (tmp_path / "f").stat().st_mtime_ns - 3600 * SECOND
    os.utime(tmp_path / "f", ns=(hour_ago, hour_ago))
    first = stamps_at(tmp_path, after=0)
    first.put("f", "digest", stamp_of((tmp_path / "f").stat()))
    first.save()
    assert stamps_at(tmp_path, after=10).file("f", follow=False) == "digest"
    (tmp_path / "f").write_text("another")
    again = stamps_at(tmp_path, after=10)
    assert (again.file("f", follow=False), again.hashed) == (hash_file(str(tmp_path / "f")), ["f"])


def test_broken_memory_is_no_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    for broken in ("", "{", "[]", '{"version": 99, "files": {}}'):
        (tmp_path / "stamps").write_text(broken)
        assert stamps_at(tmp_path, after=5).file("f", follow=False) is not None


def test_folder_digest_counts_names_content_and_executable_bit(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/f").write_text("1")

    def digest() -> str:
        return folder_digest(stamps_at(tmp_path, after=5), "d", follow=False)

    seen = [digest()]
    (folder / "sub/f").write_text("2")
    seen.append(digest())
    (folder / "sub/f").chmod(0o755)
    seen.append(digest())
    (folder / "sub/f").rename(folder / "sub/g")
    seen.append(digest())
    (folder / "empty").mkdir()
    seen.append(digest())
    assert len(set(seen)) == 5
    os.utime(folder / "sub/g", (1, 1))
    (folder / "sub/g").chmod(0o711)
    assert digest() == seen[-1]


def test_folder_of_an_artifact_with_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link").symlink_to("/etc/hostname")
    with pytest.raises(UnfitContent, match="d/link is a link"):
        folder_digest(stamps_at(tmp_path, after=5), "d", follow=False)


def test_links_in_sources_are_followed(tmp_path: Path) -> None:
    for name in ("plain", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain/f").write_text("1")
    (tmp_path / "linked/f").symlink_to(tmp_path / "plain/f")
    stamps = stamps_at(tmp_path, after=5)
    digests = {folder_digest(stamps, name, follow=True) for name in ("plain", "linked")}
    assert len(digests) == 1


def test_circle_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/e/up").symlink_to(tmp_path / "d/e")
    with pytest.raises(UnfitContent, match="leads back"):
        folder_digest(stamps_at(tmp_path, after=5), "d", follow=True)


def test_what_git_rewrites_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "d/.git").mkdir(parents=True)
    (tmp_path / "d/f").write_text("1")
    before = folder_digest(stamps_at(tmp_path, after=5), "d", follow=True)
    (tmp_path / "d/.git/index").write_text("x")
    assert folder_digest(stamps_at(tmp_path, after=5), "d", follow=True) == before


def test_model_is_digested_by_its_parts(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "old.bin"):
        (model / name).write_text(name)
    source = Source("model", "model", {"path": str(model)}, {}, WHERE)
    parts = ("config", "weights", "tokenizer")

    def entries() -> dict[str, str | None]:
        found = source_entries(stamps_at(tmp_path, after=5), source, parts)
        return {str(label): digest for label, digest in found}

    before = entries()
    assert list(before) == ["model:config", "model:weights", "model:tokenizer"]
    (model / "README.md").write_text("edited")
    (model / "old.bin").write_text("pickles count only where there is no safetensors file")
    assert entries() == before
    (model / "model.safetensors").write_text("edited")
    after = entries()
    assert {label for label in after if after[label] != before[label]} == {"model:weights"}
    (model / "model.safetensors").unlink()
    assert entries()["model:weights"] not in (before["model:weights"], after["model:weights"])


def test_memory_is_written_anew_only_where_that_is_less_work_than_to_read_again(
    tmp_path: Path,
) -> None:
    for number in range(100):
        (tmp_path / f"f{number}").write_text(f"{number}")
    first = stamps_at(tmp_path, after=2.5)
    for number in range(100):
        first.file(f"f{number}", follow=False)
    first.save()
    written = (tmp_path / "stamps").stat().st_mtime_ns
    (tmp_path / "f1").write_text("a few bytes")
    second = stamps_at(tmp_path, after=10)
    second.file("f1", follow=False)
    second.save()
    assert (tmp_path / "stamps").stat().st_mtime_ns == written
    (tmp_path / "f2").write_bytes(bytes(1 << 20))
    third = stamps_at(tmp_path, after=20)
    third.file("f1", follow=False)
    third.file("f2", follow=False)
    assert third.hashed == ["f1", "f2"]
    third.save()
    fourth = stamps_at(tmp_path, after=30)
    fourth.file("f1", follow=False)
    fourth.file("f2", follow=False)
    assert fourth.hashed == []
