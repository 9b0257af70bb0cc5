"""A shop whose answers and cones are looked at, and what its steps may do."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from buildsys.engine.build import Request, Tools, judge_all
from buildsys.engine.cone import Cone, build_cone, cone_of
from buildsys.engine.executor import Order
from buildsys.engine.project import Project, find_place
from buildsys.engine.staleness import Verdict
from buildsys.engine.standing import Answer, Difference, look
from buildsys.plan.cached import to_json
from tests.engine.shop import Failed, Say, Shop, concatenate, forget_modules


class Found(NamedTuple):
    """What the look at the standing answer led to. verdicts: of the cone's steps; None: the
    whole plan must be asked; empty: nothing is to be done."""

    verdicts: dict[str, Verdict] | None
    cone: Cone | None = None
    difference: Difference | None = None


class Workshop(Shop):
    """A shop whose plan is a recipe file's, so that plans are remembered and answers left."""

    def project(self) -> Project:
        project = super().project()
        recipe = Path(project.recipe)
        text = json.dumps(to_json(project.plan))
        if not recipe.exists() or recipe.read_text() != text:
            recipe.write_text(text)
        return project._replace(files=(project.recipe,))

    def own(self, name: str) -> Path:
        return self.build_root / ".qbuild" / name

    def look(self) -> Found:
        """As the command line looks; the lock of a difference is held until `release`."""
        project = self.project()
        place = find_place(project.recipe, {}, str(self.build_root))
        found = look(place) if place is not None else None
        if isinstance(found, Answer):
            return Found({})
        if found is None:
            return Found(None)
        cone = cone_of(found)
        if cone is None:
            found.lock.release()
            return Found(None)
        judge_all(cone.scene.survey, tuple(cone.numbers))
        verdicts = cone.scene.survey.verdicts
        return Found({name: verdicts[name] for name in cone.numbers}, cone, found)

    def release(self, found: Found) -> None:
        if found.difference is not None:
            found.difference.lock.release()

    def verdicts(self) -> dict[str, Verdict]:
        """Of all steps, from the whole plan and the whole journal."""
        forget_modules()
        return self.survey().survey.verdicts

    def build_found(self, found: Found) -> list[str]:
        """Build a cone; the steps that ran."""
        assert found.cone is not None
        assert found.difference is not None
        ran: list[str] = []
        forget_modules()
        tools = Tools(partial(self._executor, ran), lambda: Say([]), lambda line: None)
        request = Request(tuple(found.cone.numbers), frozenset(), keep_going=True)
        try:
            build_cone(found.cone, found.difference, request, tools)
        finally:
            self.release(found)
        return ran


def make_folder(order: Order) -> None:
    for path in order.context["outputs"].values():
        Path(path).mkdir()
        (Path(path) / "deep").mkdir()
    concatenate(
        order._replace(
            context={
                **order.context,
                "outputs": {k: f"{v}/deep/f" for k, v in order.context["outputs"].items()},
            }
        )
    )


def write_figure(order: Order) -> None:
    for path in order.context["outputs"].values():
        Path(path).write_text(json.dumps({"loss": 0.5}))


def always_the_same(order: Order) -> None:
    for path in order.context["outputs"].values():
        Path(path).write_text("constant")


def fails(order: Order) -> None:
    raise Failed("it fails")


def swap_with_old_times(path: Path) -> None:
    """Other bytes of the same length under the same times; another inode, as `mv` leaves it."""
    before = path.stat()
    other = path.with_name("swapped")
    other.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
