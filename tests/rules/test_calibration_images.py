"""Images to calibrate with: pinned, checked, and synthetic only where the recipe says so."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from buildsys.errors import StepError
from buildsys.rules import calibration_images
from tests.rules.plans import plan_of

EMPTY: dict[str, Any] = {
    "dataset": None,
    "revision": None,
    "url": None,
    "sha256": None,
    "synthetic": False,
}


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["zip", "tar"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"images.{request.param}"
    content = {"b.png": picture(1), "a.png": picture(0), "README": b"no image", "c.png": picture(2)}
    if request.param == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, data in content.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(path, "w") as packed_tar:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                packed_tar.addfile(member, io.BytesIO(data))
    return path


def by_url(archive: Path, **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"url": archive.as_uri(), "sha256": digest, "samples": 2, **changes}


def test_an_archives_images_come_in_the_order_of_their_names(make: Any, archive: Path) -> None:
    made = make("calibration-images", "images", {}, by_url(archive, size=None))
    assert sorted(each.name for each in made.out.iterdir()) == ["image_0000.jpg", "image_0001.jpg"]
    for index in range(2):
        with Image.open(made.out / f"image_{index:04d}.jpg") as found:
            assert found.size == (30, 40)
            expected = io.BytesIO()
            Image.open(io.BytesIO(picture(index))).convert("RGB").save(expected, "JPEG", quality=95)
            assert (made.out / f"image_{index:04d}.jpg").read_bytes() == expected.getvalue()
    assert not (made.out.parent / ".archive").exists()


def test_an_archive_of_other_bytes_or_with_too_few_images_is_refused(
    make: Any, archive: Path
) -> None:
    with pytest.raises(StepError, match="the recipe says 0000"):
        make("calibration-images", "images", {}, by_url(archive, sha256="0" * 64))
    with pytest.raises(StepError, match="there are 3 images, not 4"):
        make("calibration-images", "images", {}, by_url(archive, samples=4))


def test_what_cannot_be_fetched_is_an_error_and_no_noise(make: Any, tmp_path: Path) -> None:
    options = {"url": (tmp_path / "missing.zip").as_uri(), "sha256": "0" * 64}
    with pytest.raises(StepError, match="cannot be fetched"):
        make("calibration-images", "images", {}, options)


def test_without_the_package_a_data_set_is_an_error_that_names_it(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    options = {"dataset": "detection-datasets/coco", "revision": "main"}
    with pytest.raises(StepError, match="need the package `datasets`") as caught:
        make("calibration-images", "images", {}, options)
    assert "pip install datasets" in str(caught.value)


def test_synthetic_images_repeat_and_follow_the_seed(make: Any) -> None:
    def content(seed: int) -> list[bytes]:
        options = {"synthetic": True, "samples": 3, "size": [28, 56], "seed": seed}
        made = make("calibration-images", "images", {}, options)
        return [file.read_bytes() for file in sorted(made.out.iterdir())]

    first = content(0)
    assert len(set(first)) == 3
    assert first == content(0)
    assert first != content(1)


def test_images_come_from_exactly_one_place_that_is_pinned() -> None:
    def problems(**options: Any) -> list[str]:
        step, plan = plan_of("images/", "calibration-images", options={**EMPTY, **options})
        return [problem.message for problem in calibration_images.check(step, plan)]

    assert problems(synthetic=True) == []
    assert problems() == ["images come from one of dataset, url, synthetic; none is given"]
    assert problems(synthetic=True, url="x", sha256="0" * 64)
    assert problems(url="x") == ["an archive by url needs its sha256"]
    assert problems(dataset="x") == ["a data set may change: it needs a revision"]
