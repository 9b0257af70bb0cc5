"""Looks before a byte is sent: does what is pushed fit the device, and does it belong together?"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from buildsys.devices.errors import DeviceRefused

if TYPE_CHECKING:
    from buildsys.devices.definitions import Device
    from buildsys.devices.payload import PushFile
    from buildsys.devices.remote_folder import Survey

# What `uname -m` and Android's ABIs call the machines that ELF headers name.
MACHINES = {
    "aarch64": "AArch64", "arm64": "AArch64", "arm64-v8a": "AArch64",
    "armv7l": "ARM", "armv8l": "ARM", "armeabi-v7a": "ARM", "armeabi": "ARM",
    "x86_64": "x86-64", "amd64": "x86-64", "i686": "x86", "x86": "x86",
    "riscv64": "RISC-V", "loongarch64": "LoongArch",
}  # fmt: skip
# Snapdragon -> architecture of its Hexagon processor. Source: Qualcomm's table of supported
# devices in the documentation of AI Engine Direct.
HTP = {
    "SM8350": "v68", "SM8450": "v69", "SM8475": "v69", "SM8550": "v73", "SM8650": "v75",
    "SM8750": "v79", "SM8850": "v81",
}  # fmt: skip
TOOLS = ("sha256sum", "stat")
HTP_SET = ("libQnnHtp.so", "libQnnSystem.so")
QNN_LIBRARY = re.compile(r"lib(?:Qnn|QNN|Snpe|Genie)\w*\.so")
VERSIONED = re.compile(r"libQnnHtpV(\d+)(Stub|Skel)\.so")
BMODEL_MAGIC = bytes.fromhex("eeaa55ff")
BMODEL_CHIP = re.compile(rb"(?:BM|bm)16\d\d[A-Za-z]*\d?|(?:CV|cv)186[A-Za-z]+|SG2\d\d\d[A-Z]?")
BMODEL_HEAD = 64 << 20


class DeviceFacts(NamedTuple):
    """machines: ELF machines that it runs. soc, htp, chip: "" where it has or says none."""

    machines: frozenset[str]
    soc: str
    htp: str
    chip: str
    all: Mapping[str, str]


def facts_of(survey: Survey) -> DeviceFacts:
    """What the survey's facts mean."""
    raw = survey.facts
    abis = raw.get("ro.product.cpu.abilist") or raw.get("machine", "")
    machines = frozenset(MACHINES[abi] for abi in abis.split(",") if abi in MACHINES)
    soc = raw.get("ro.soc.model", "").upper()
    # SM8650-AB and SM8650P are SM8650 as far as libraries go.
    base = re.match(r"SM\d{4}", soc)
    htp = HTP.get(base[0], "") if base else ""
    chip = raw.get("chip", "")
    named = {"soc": soc, "htp": htp, "chip": chip, "machine": raw.get("machine", "")}
    return DeviceFacts(machines, soc, htp, chip, {**raw, **{k: v for k, v in named.items() if v}})


def check_device(device: Device, files: Sequence[PushFile], survey: Survey) -> None:
    """Raises DeviceRefused with everything that does not fit, before anything is sent."""
    facts = facts_of(survey)
    problems = [
        *missing_tools(survey),
        *requirements(device, facts),
        *wrong_machines(files, facts),
        *wrong_hexagon(files, facts),
        *qnn_set(files),
        *wrong_chips(files, facts),
        *occupied(survey),
    ]
    if problems:
        raise DeviceRefused(
            f"{device.name} is not sent anything:\n  " + "\n  ".join(problems),
        )


def missing_tools(survey: Survey) -> Iterator[str]:
    for tool in TOOLS:
        if f"has-{tool}" not in survey.facts:
            yield f"it has no {tool}"
    if "writable" not in survey.facts:
        yield "the root, or the folder that it would be made in, cannot be written to"


def requirements(device: Device, facts: DeviceFacts) -> Iterator[str]:
    """What the recipe requires of the device."""
    for name, value in device.require.items():
        has = facts.all.get(name)
        if has is None or has.casefold() != value.casefold():
            known = ", ".join(f"{key} {each}" for key, each in sorted(facts.all.items()))
            tells = f"is {has}" if has else f"is not known (known: {known})"
            yield f"{name} must be {value}, and {tells}"


def wrong_machines(files: Sequence[PushFile], facts: DeviceFacts) -> Iterator[str]:
    for file in files:
        machine = file.facts.machine
        hexagon = machine.startswith("Hexagon")
        if machine and not hexagon and facts.machines and machine not in facts.machines:
            runs = " and ".join(sorted(facts.machines))
            yield f"{file.target} is for {machine}, and the device runs {runs} ({file.path})"


def wrong_hexagon(files: Sequence[PushFile], facts: DeviceFacts) -> Iterator[str]:
    """Of libraries that differ in the version only, one has to be the device's."""
    groups: dict[str, list[PushFile]] = {}
    for file in files:
        if file.facts.machine.startswith("Hexagon"):
            base = re.sub(r"V\d+", "V", posixpath.basename(file.target))
            groups.setdefault(base, []).append(file)
    for group in groups.values():
        made_for = {file.facts.machine.removeprefix("Hexagon ") for file in group}
        if facts.htp and facts.htp not in made_for:
            names = ", ".join(file.target for file in group)
            made = " and ".join(sorted(made_for))
            yield f"{names}: for Hexagon {made}, and {facts.soc} has {facts.htp}"


def qnn_set(files: Sequence[PushFile]) -> Iterator[str]:
    """Qualcomm's libraries are complete, and of one build."""
    by_name = {posixpath.basename(file.target): file for file in files}
    libraries = {name: file for name, file in by_name.items() if QNN_LIBRARY.fullmatch(name)}
    builds: dict[str, list[str]] = {}
    for name, file in libraries.items():
        if file.facts.qnn:
            builds.setdefault(file.facts.qnn, []).append(name)
    if len(builds) > 1:
        listed = "; ".join(f"{build}: {', '.join(names)}" for build, names in builds.items())
        yield f"QNN libraries of several builds: {listed}"
    versions: dict[str, set[str]] = {}
    for name in libraries:
        match = VERSIONED.fullmatch(name)
        if match:
            versions.setdefault(match[1], set()).add(match[2])
    if "libQnnHtp.so" in libraries or versions:
        for name in HTP_SET:
            if name not in libraries:
                yield f"the QNN libraries lack {name}"
        complete = [version for version, kinds in versions.items() if len(kinds) == 2]
        if not complete:
            yield "the QNN libraries lack libQnnHtpVNNStub.so and libQnnHtpVNNSkel.so of one NN"


def wrong_chips(files: Sequence[PushFile], facts: DeviceFacts) -> Iterator[str]:
    """A bmodel says for which chip it was compiled."""
    for file in files:
        if not file.target.endswith(".bmodel") or not facts.chip:
            continue
        chips = bmodel_chips(file.path)
        if chips and facts.chip.upper() not in chips:
            yield f"{file.target} is for {' and '.join(sorted(chips))}, not for {facts.chip}"


def bmodel_chips(path: str) -> set[str]:
    """The chips that the head of a bmodel names; none for what is no bmodel."""
    with Path(path).open("rb") as file:
        head = file.read(64)
        if head[:4] != BMODEL_MAGIC:
            return set()
        size = min(int.from_bytes(head[8:12], "little"), BMODEL_HEAD)
        description = file.read(size)
    return {found.decode().upper() for found in BMODEL_CHIP.findall(description)}


def occupied(survey: Survey) -> Iterator[str]:
    for path, kind in survey.odd.items():
        yield f"{path} is a {kind} on the device; remove it there first"
