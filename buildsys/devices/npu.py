"""Is a .mxq for the NPU that the device has? Mobilint's runtime there is asked.

Source: qbruntime 1.5.0, `get_available_devices()`: names such as "aries-rb"; an empty list where
no NPU is found. The file itself is not asked: only the compiler's option says what it was made
for, and the build's journal has kept that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.devices.errors import DeviceRefused
from buildsys.devices.transport import Transport, call, quoted

if TYPE_CHECKING:
    from buildsys.devices.payload import PushFile
    from buildsys.devices.progress import Report
    from buildsys.plan.graph import Json, Plan

SUFFIX = ".mxq"
RULE = "mxq"
OPTION = "target_device"
# Short names, and what compilers before 1.2 said: qbruntime reads them so, too.
SAME = {"aries": "aries-rb", "aries2": "aries-rb", "regulus": "regulus-ra"}
ASK = """import importlib.util, sys
if importlib.util.find_spec("qbruntime") is None:
    print("qbuild-npu absent")
    sys.exit()
try:
    import qbruntime
    print("qbuild-npu has", *qbruntime.get_available_devices())
except Exception as error:  # whatever the vendor raises is what is told
    print("qbuild-npu failed", type(error).__name__, str(error).replace("\\n", " "))
"""
ANSWER = re.compile(r"^qbuild-npu (absent|has|failed) ?(.*)$", re.MULTILINE)


class Answer(NamedTuple):
    """names: of the NPUs there. unknown: why they are not known, "" where they are."""

    names: tuple[str, ...]
    unknown: str


def with_npus(plan: Plan, done: Mapping[str, Json], files: Sequence[PushFile]) -> list[PushFile]:
    """The files, each .mxq of them with the NPUs that its compiler was told.

    done: step -> its last journal line, which counts more than the recipe: the artifact may be
    stale. A .mxq that the build did not make is of no known NPU.
    """
    known = []
    for file in files:
        step = plan.producer.get(file.artifact)
        if step is not None and file.path.endswith(SUFFIX):
            file = file._replace(npus=frozenset(compiled_for(plan, done, step)))
        known.append(file)
    return known


def compiled_for(plan: Plan, done: Mapping[str, Json], step: str) -> set[str]:
    """The option of the nearest steps that compile; a folder of two models has two."""
    made = plan.steps[step]
    if made.rule == RULE:
        line = done.get(step)
        options = line["parts"].get("options", {}) if line is not None else {}
        said = options.get(OPTION, made.options.get(OPTION))
        return {str(said)} if said else set()
    names = {ref.name for refs in made.inputs.values() for ref in refs}
    found: set[str] = set()
    for maker in {plan.producer[name] for name in names if name in plan.producer}:
        found |= compiled_for(plan, done, maker)
    return found


def check_npus(transport: Transport, files: Sequence[PushFile], report: Report) -> None:
    """Raises DeviceRefused for a .mxq that no NPU there can run.

    A device that gets none is not asked: a Python takes its time. Where qbruntime cannot say,
    that is told and nothing is refused: the runtime may be in a Python of its own.
    """
    wanted = {file.target: file.npus for file in files if file.npus}
    if not wanted:
        return
    answer = ask(transport)
    if answer.unknown:
        text = f"warning: not checked whether its NPU runs {', '.join(wanted)}: {answer.unknown}"
        report.event("unchecked", text, files=list(wanted))
        return
    there = {normal(name) for name in answer.names}
    has = (
        f"the device has {' and '.join(answer.names)}" if there else "qbruntime finds no NPU there"
    )
    problems = [
        f"{target} is for {' and '.join(sorted(npus))}, and {has}"
        for target, npus in wanted.items()
        if not {normal(npu) for npu in npus} <= there
    ]
    if problems:
        raise DeviceRefused(
            f"{transport.name} is not sent anything:\n  " + "\n  ".join(problems),
            remedy=f"build with the `{OPTION}` of the device" if there else "see to its driver",
        )


def normal(name: str) -> str:
    """One name for what runs the same .mxq.

    >>> normal("REGULUS-RA-USB"), normal("aries2")
    ('regulus-ra', 'aries-rb')
    """
    name = name.casefold().removesuffix("-usb")
    return SAME.get(name, name)


def ask(transport: Transport) -> Answer:
    """What qbruntime on the device says. Raises LinkLost."""
    script = (
        "command -v python3 >/dev/null 2>&1 || { echo qbuild-npu failed no python3; exit 0; }\n"
        f"python3 -c {quoted(ASK)} </dev/null 2>&1 || :"
    )
    said = call(transport, script, what="ask qbruntime for its devices").decode(errors="replace")
    match = ANSWER.search(said)
    if match is None:
        last = said.strip().splitlines()[-1:] or ["nothing was printed"]
        return Answer((), f"python3 there failed: {last[0]}")
    if match[1] == "absent":
        return Answer((), "its python3 has no qbruntime (pip install mobilint-qb-runtime)")
    if match[1] == "failed":
        return Answer((), match[2])
    return Answer(tuple(match[2].split()), "")
