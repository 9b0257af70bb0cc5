"""What a resumable step keeps: for its own key, until it is committed."""

from __future__ import annotations

from pathlib import Path

from buildsys.engine.folder import BuildFolder
from buildsys.engine.keeping import forget_kept, kept_folder


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
