"""A project of tiny steps, built by the real engine with an executor that runs them in process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from buildsys.engine.blueprint import draw
from buildsys.engine.build import Outcome, Request, Tools, build_what_is_stale, judge_all
from buildsys.engine.display import PlainDisplay
from buildsys.engine.executor import Ended, Event, Order
from buildsys.engine.folder import BuildFolder
from buildsys.engine.project import Project, Scene, survey_of
from buildsys.engine.storing import StepCache
from buildsys.errors import Location
from buildsys.plan.graph import Gate, Plan, Ref, Source, Step
from buildsys.plan.order import topological
from buildsys.plan.targets import steps_read, targets, upstream
from buildsys.rules.spec import InputSpec, Rule

WHERE = Location("r.yaml", 1, 1, "")
PACKAGE = "shop_parts"
RULE_MODULE = f"{PACKAGE}.rule"
RULE_CODE = '''
"""The rule of the tests."""
from shop_parts.arithmetic import SIGN


def make(step):
    return SIGN
'''
Action = Callable[[Order], None]


class Failed(Exception):
    """Raised by an action: the step fails with this text."""


def concatenate(order: Order) -> None:
    """The default action: every output holds the inputs' bytes and the option "text"."""
    given = [
        Path(item["paths"]["path"]) for items in order.context["inputs"].values() for item in items
    ]
    content = b"".join(content_of(path) for path in given)
    content += str(order.context["options"].get("text", "")).encode()
    for path in order.context["outputs"].values():
        Path(path).write_bytes(content)


def content_of(path: Path) -> bytes:
    if path.is_dir():
        return b"".join(each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file())
    return path.read_bytes()


class InProcess:
    """An executor that runs a function per order, at once. Notes what ran, in order."""

    elsewhere = False

    def __init__(self, actions: Mapping[str, Action], ran: list[str]) -> None:
        self._actions = actions
        self._ran = ran
        self._events: list[Event] = []
        self.closed = False

    def submit(self, order: Order) -> None:
        self._ran.append(order.id)
        error = ""
        try:
            self._actions.get(order.id, concatenate)(order)
        except Failed as failed:
            error = str(failed)
        code = 1 if error else 0
        ended = Ended(order.id, code, 0, False, False, error, "", {}, (), 0.01, 0.01, 1 << 20, 0)
        self._events.append(ended)

    def cancel(self, name: str) -> None:
        raise AssertionError("nothing runs in parallel here")

    def poll(self, timeout: float) -> list[Event]:
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        self.closed = True


class Built:
    """What came of a build. ran: the steps that ran, in order; said: lines for the person."""

    def __init__(self, ran: list[str], said: list[str], scene: Scene, outcome: Outcome | None):
        self.ran = ran
        self.said = said
        self.scene = scene
        self.outcome = outcome

    @property
    def failures(self) -> dict[str, str]:
        return {each.step: str(each) for each in self.outcome.failures} if self.outcome else {}


class Shop:
    """Sources, steps and their actions in a temporary folder; `build` returns what ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.build_root = root / "build"
        self.sources: dict[str, Source] = {}
        self.steps: dict[str, Step] = {}
        self.gates: list[Gate] = []
        self.actions: dict[str, Action] = {}
        self.cache: Callable[..., StepCache | None] = lambda folder, stamps, say: None
        self.parts: tuple[Any, ...] = ()
        self.resumable = False
        (root / PACKAGE).mkdir()
        self.code("__init__", "")
        self.code("rule", RULE_CODE)
        self.code("arithmetic", "SIGN = 1\n")

    def code(self, module: str, text: str) -> None:
        """Write a module of the package that the rule lies in."""
        (self.root / PACKAGE / f"{module}.py").write_text(text)

    def source(self, name: str, text: str = "", kind: Any = "file", **options: Any) -> Path:
        path = self.root / f"{name}.txt"
        if text:
            path.write_text(text)
        self.sources[name] = Source(name, kind, {"path": str(path)}, options, WHERE)
        return path

    def step(self, name: str, *reads: str, **changes: Any) -> None:
        """A step that reads sources and outputs by name; "?name" may be missing."""
        options = changes.pop("options", {})
        outputs = {"out": name, **changes.pop("outputs", {})}
        refs = tuple(self._ref(word) for word in reads)
        blank = Step(
            name,
            "shop",
            {"i": refs},
            options,
            outputs,
            False,
            False,
            (),
            1,
            {},
            None,
            None,
            {},
            WHERE,
        )
        self.steps[name] = blank._replace(**changes)

    def _ref(self, word: str) -> Ref:
        name = word.removeprefix("?")
        return Ref("source" if name in self.sources else "artifact", name, word != name)

    def plan(self) -> Plan:
        producer = {path: name for name, s in self.steps.items() for path in s.outputs.values()}
        plan = Plan("shop", "r.yaml", {}, self.sources, self.steps, producer, tuple(self.gates), {})
        order = topological({name: steps_read(plan, step) for name, step in self.steps.items()})
        return plan._replace(steps={name: self.steps[name] for name in order})

    def project(self) -> Project:
        inputs = {"i": InputSpec("", many=True, parts=self.parts)}
        rule = Rule("shop", "", inputs=inputs, resumable=self.resumable)
        blueprint = draw(self.plan(), {"shop": (RULE_MODULE, rule)})
        recipe = str(self.root / "r.yaml")
        return Project(recipe, {}, BuildFolder(str(self.build_root)), blueprint, ())

    def build(
        self, *words: str, at: Callable[[str], None] = lambda _: None, **request: Any
    ) -> Built:
        ran: list[str] = []
        said: list[str] = []
        project = self.project()
        wanted = targets(project.plan, words)
        selection = upstream(project.plan, wanted)
        named = frozenset(wanted) if words else frozenset()
        forget_modules()
        runs = partial(self._executor, ran)
        tools = Tools(runs, lambda: Say(said), said.append, at, self.cache)
        asked = Request(selection, named, **request)
        _, scene, outcome = build_what_is_stale(project, asked, tools)
        return Built(ran, said, scene, outcome)

    def _executor(self, ran: list[str], lock_fd: int) -> InProcess:
        return InProcess(self.actions, ran)

    def survey(self) -> Scene:
        """Every step judged, nothing built."""
        project = self.project()
        scene = survey_of(project)
        judge_all(scene.survey, tuple(project.plan.steps))
        return scene

    def why(self, name: str) -> list[str]:
        return [str(reason) for reason in self.survey().survey.verdicts[name].reasons]

    def state(self, name: str) -> str:
        return self.survey().survey.verdicts[name].state

    def read(self, name: str) -> str:
        return (self.build_root / name).read_text()

    def edit(self, step: str, **options: Any) -> None:
        self.steps[step] = self.steps[step]._replace(options=options)


def forget_modules() -> None:
    """The next import reads the rule's files again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    importlib.invalidate_caches()


class Say(PlainDisplay):
    """Keeps what would be printed."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def say(self, text: str) -> None:
        self._said.append(text)
