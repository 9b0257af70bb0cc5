"""Rule `calibration-images`: a folder of images to calibrate with, as an artifact of its own.

From a data set of the hub (`dataset`, which needs the package `datasets`), from an archive
(`url` and `sha256`), or synthetic, where the recipe says so and only there. What cannot be had
is an error: the vendor's script falls back to noise, and nobody notices.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.spec import Problem, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from buildsys.plan.graph import Plan, Step

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
KINDS = ("dataset", "url", "synthetic")


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """Images come from one place, and what is fetched by name is pinned."""
    given = [kind for kind in KINDS if step.options[kind]]
    if len(given) != 1:
        names = "none is given" if not given else f"{' and '.join(given)} are given"
        yield Problem(f"images come from one of {', '.join(KINDS)}; {names}", "Give exactly one.")
    if step.options["url"] and not step.options["sha256"]:
        yield Problem("an archive by url needs its sha256", "Add `sha256: ...`.", option="url")
    if step.options["dataset"] and not step.options["revision"]:
        remedy = "Add `revision:` with a commit of the data set."
        yield Problem("a data set may change: it needs a revision", remedy, option="dataset")


def _text(description: str) -> dict[str, Any]:
    return {"type": ["string", "null"], "default": None, "description": description}


RULE = Rule(
    name="calibration-images",
    doc="Images from a data set of the hub, from an archive, or synthetic ones.",
    options={
        "dataset": _text("A data set of the hub, such as detection-datasets/coco."),
        "revision": _text("A commit of the data set."),
        "split": {"type": "string", "default": "val", "description": "Its split."},
        "url": _text("A .zip or .tar archive of images."),
        "sha256": {
            "type": ["string", "null"],
            "pattern": "^[0-9a-f]{64}$",
            "default": None,
            "description": "SHA-256 of the archive.",
        },
        "synthetic": {
            "type": "boolean",
            "default": False,
            "description": "Make images of noise over gradients: they exercise the build and "
            "calibrate badly.",
        },
        "seed": {"type": "integer", "default": 0, "description": "Of synthetic images."},
        "samples": {
            "type": "integer",
            "minimum": 1,
            "default": 100,
            "description": "How many images.",
        },
        "size": {
            "type": ["array", "null"],
            "items": {"type": "integer", "minimum": 1},
            "minItems": 2,
            "maxItems": 2,
            "default": [224, 224],
            "description": "Height and width; null keeps each image's own.",
        },
    },
    distributions=("pillow", "numpy"),
    folder=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Write image_0000.jpg and so on. Raises StepError where there are fewer than `samples`."""
    wanted, size = int(step.options["samples"]), step.options["size"]
    step.out.mkdir(exist_ok=True)
    count = 0
    for image in _images(step):
        # PIL counts (width, height); LANCZOS and quality 95 are the vendor's.
        fitted = image.convert("RGB")
        fitted = fitted if size is None else fitted.resize(size[::-1], resample=1)
        fitted.save(step.out / f"image_{count:04d}.jpg", quality=95)
        count += 1
        step.progress(count, wanted, "images")
        if count == wanted:
            break
    if count < wanted:
        raise StepError(
            f"{step.name}: there are {count} images, not {wanted}",
            remedy="Ask for fewer samples, or name a larger set.",
        )
    step.note("images", {kind: step.options[kind] for kind in KINDS if step.options[kind]})


def _images(step: StepContext) -> Iterable[Image]:
    if step.options["synthetic"]:
        return _synthetic(step)
    return _dataset(step) if step.options["dataset"] else _archive(step)


def _synthetic(step: StepContext) -> Iterator[Image]:
    """Noise over a horizontal gradient, 0.7 to 0.3 as the vendor mixes them, but seeded."""
    import numpy as np
    from PIL import Image

    height, width = step.options["size"] or (224, 224)
    gradient = np.linspace(0.0, 255.0, width)[None, :, None]
    for index in range(int(step.options["samples"])):
        generator = np.random.default_rng([int(step.options["seed"]), index])
        noise = generator.integers(0, 256, (height, width, 3))
        yield Image.fromarray((0.7 * noise + 0.3 * gradient).astype(np.uint8))


def _dataset(step: StepContext) -> Iterator[Image]:
    """The first images of a split, streamed."""
    for name in OFFLINE_VARIABLES:
        os.environ.pop(name, None)  # this step's purpose is to fetch
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise StepError(
            f"{step.name}: data sets of the hub need the package `datasets`",
            remedy="pip install datasets, or give `url` and `sha256`, or a folder of images.",
        ) from error
    name, revision = step.options["dataset"], step.options["revision"]
    try:
        rows = load_dataset(name, split=step.options["split"], revision=revision, streaming=True)
        for row in rows:
            yield row["image"]
    except (OSError, ValueError, KeyError) as error:
        raise StepError(f"{step.name}: {name} cannot be read: {error}") from error


def _archive(step: StepContext) -> Iterator[Image]:
    """The images of an archive, by name; its bytes are checked before any is read."""
    from PIL import Image, UnidentifiedImageError

    archive = step.out.parent / ".archive"
    _fetch(step, archive)
    try:
        for name, file in _members(archive):
            try:
                with Image.open(file) as image:
                    yield image.convert("RGB")
            except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
                raise StepError(f"{step.name}: {name} is no image ({error})") from error
    finally:
        archive.unlink()


def _fetch(step: StepContext, target: Path) -> None:
    import hashlib
    import shutil
    import urllib.request

    url = str(step.options["url"])
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, target.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except (OSError, ValueError) as error:
        raise StepError(f"{step.name}: {url} cannot be fetched: {error}") from error
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != step.options["sha256"]:
        raise StepError(
            f"{step.name}: {url} has sha256 {found}, the recipe says {step.options['sha256']}",
            remedy="Somebody changed the file, or the recipe is wrong.",
        )


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    """(name, open file) of the images in a zip or tar archive, sorted by name; nothing is
    unpacked to the disk."""
    import tarfile
    import zipfile

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for name in sorted(filter(_is_image, packed.namelist())):
                with packed.open(name) as file:
                    yield name, file
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as packed_tar:
            for name in sorted(filter(_is_image, packed_tar.getnames())):
                member = packed_tar.extractfile(name)
                if member is not None:
                    yield name, member
    else:
        raise StepError("the archive is neither zip nor tar")


def _is_image(name: str) -> bool:
    return name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
