"""What a resumable step keeps: for its own key, until it is committed."""

from __future__ import annotations

from pathlib import Path

from buildsys.engine.folder import BuildFolder
from buildsys.engine.keeping import READ, forget_kept, kept_folder, trust_kept


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
