"""What a resumable step keeps: for its own key, until it is committed."""

from __future__ import annotations

import os
from pathlib import Path

from buildsys.engine.folder import BuildFolder
from buildsys.engine.keeping import READ, forget_kept, kept_folder, stamps_below, trust_kept


def test_the_same_key_finds_what_it_kept_and_another_finds_nothing(tmp_path: Path) -> None:
    folder = BuildFolder(str(tmp_path))
    first = Path(kept_folder(folder, "calibration/language/", "key"))
    (first / "sample_000").mkdir()
    other = Path(kept_folder(folder, "calibration/vision/", "key"))
    assert other != first
    assert list(other.iterdir()) == []
    again = Path(kept_folder(folder, "calibration/language/", "key"))
    assert again == first
    assert [each.name for each in again.iterdir()] == ["sample_000"]
    changed = Path(kept_folder(folder, "calibration/language/", "another"))
    assert list(changed.iterdir()) == []
    assert not first.exists()


def test_a_committed_step_keeps_nothing(tmp_path: Path) -> None:
    folder = BuildFolder(str(tmp_path))
    kept = Path(kept_folder(folder, "a/", "key"))
    (kept / "file").write_text("x")
    forget_kept(folder, "a/")
    forget_kept(folder, "a/")
    assert not kept.exists()
    assert list((tmp_path / ".qbuild" / "kept").iterdir()) == []


def test_kept_work_is_trusted_under_the_stamps_that_it_was_begun_with(tmp_path: Path) -> None:
    folder = BuildFolder(str(tmp_path))
    trust_kept(folder, "a/", {"/src": [1, 2]})
    kept = Path(kept_folder(folder, "a/", "key"))
    (kept / "half").write_text("x")
    trust_kept(folder, "a/", {"/src": [1, 2]})
    assert (Path(kept_folder(folder, "a/", "key")) / "half").exists()
    trust_kept(folder, "a/", {"/src": [1, 3]})
    assert not kept.exists()
    (kept / "half").parent.mkdir()
    (kept.parent / READ).write_text("{")  # torn by a loss of power
    trust_kept(folder, "a/", {"/src": [1, 3]})
    assert not kept.exists()


def test_stamps_tell_of_links_and_of_what_is_in_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("x")
    (tmp_path / "link").symlink_to("folder")
    places = [str(tmp_path / "link")]
    seen = [stamps_below(places)]
    assert stamps_below(places) == seen[0]
    os.utime(tmp_path / "folder/file", (1, 1))
    seen.append(stamps_below(places))
    (tmp_path / "folder/another").write_text("y")
    seen.append(stamps_below(places))
    (tmp_path / "next").symlink_to("folder")
    (tmp_path / "next").replace(tmp_path / "link")
    seen.append(stamps_below(places))
    assert all(a != b for number, a in enumerate(seen) for b in seen[:number])
