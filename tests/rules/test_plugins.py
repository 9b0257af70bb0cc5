"""Rules of other distributions are found without importlib.metadata, as it would find them."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

from buildsys.rules import plugins


def test_entry_points_of_what_is_installed_are_those_of_importlib_metadata() -> None:
    for group in ("console_scripts", "pytest11", "qbuild.rules"):
        expected = {point.name: point.value for point in entry_points(group=group)}
        found = dict(plugins(group, sys.path))
        bare = {name: value.partition("[")[0].strip() for name, value in expected.items()}
        assert found == bare, group


def test_the_first_on_the_path_wins_and_other_lines_are_left_alone(tmp_path: Path) -> None:
    for place in ("first", "second"):
        info = tmp_path / place / "thing-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "entry_points.txt").write_text(
            "[other]\nmine = not.this\n[qbuild.rules]\n# a comment = x\n; another = y\n"
            f"mine = {place}.rules [extra]\n\n[more]\nmine = nor.this\n"
        )
    (tmp_path / "zipped.zip").write_bytes(b"")
    search = [str(tmp_path / name) for name in ("zipped.zip", "gone", "first", "second")]
    assert dict(plugins("qbuild.rules", search)) == {"mine": "first.rules"}
