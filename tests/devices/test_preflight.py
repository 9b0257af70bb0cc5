"""What does not fit the device, or does not belong together, is refused before a byte is sent."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buildsys.devices.errors import DeviceRefused
from buildsys.devices.host_files import HostFiles, look
from buildsys.devices.lineage import check_rotations
from buildsys.devices.preflight import bmodel_chips, facts_of, qnn_set, wrong_chips, wrong_hexagon
from buildsys.devices.remote_folder import Survey
from tests.devices.conftest import make_target
from tests.devices.phone import Phone
from tests.devices.targets import Target

AARCH64, X86_64, HEXAGON = 183, 62, 164
BUILD = "2.31.0.250130151446"
OTHER = "2.36.0.250627101419"


def elf(machine: int, flags: int = 0, kind: int = 3, build: str = "") -> bytes:
    """The header of an ELF file as the System V ABI lays it out, and a version string."""
    bits = 1 if machine == HEXAGON else 2
    word = "I" if bits == 1 else "Q"
    head = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    head += struct.pack(f"<HHI{word}{word}{word}I", kind, machine, 1, 0, 0, 0, flags)
    return head.ljust(64, b"\0") + (f"v{build}_12345\0".encode() if build else b"")


def survey(**facts: str) -> Survey:
    named = {name.replace("_", "."): value for name, value in facts.items()}
    return Survey(named, 1 << 40, {}, {}, {}, None, frozenset())


def test_programs_for_another_machine_are_refused(
    phone: Phone, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """An x86 library on a phone (LLM-TPU#23): found by its header, not by its name."""
    phone.order(properties={"ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a"})
    target = make_target("adb", request, tmp_path)
    good = target.file("libA.so", elf(AARCH64))
    bad = [target.file("libB.so", elf(X86_64)), target.file("demo", Path("/bin/sh").read_bytes())]
    with pytest.raises(DeviceRefused) as caught:
        target.deploy(good, *bad)
    assert "libB.so is for x86-64, and the device runs AArch64 and ARM" in caught.value.message
    assert "demo is for x86-64" in caught.value.message
    assert target.notes.of("sending") == []
    assert target.deploy(good) == 0


def test_a_hexagon_library_of_another_version_is_refused(
    phone: Phone, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    phone.order(properties={"ro.soc.model": "SM8750"})
    target = make_target("adb", request, tmp_path)
    skel = target.file("libQnnLLaMAPackage_HTP.so", elf(HEXAGON, 0x75))
    with pytest.raises(DeviceRefused, match="for Hexagon v75, and SM8750 has v79"):
        target.deploy(skel)
    assert target.deploy(target.file("libQnnLLaMAPackage_HTP.so", elf(HEXAGON, 0x79))) == 0


def test_of_several_versions_one_has_to_fit(local: Target) -> None:
    skels = [
        local.file(f"libQnnHtpV{version}Skel.so", elf(HEXAGON, int(f"0x{version}", 16)))
        for version in ("73", "75")
    ]
    sm8650 = facts_of(survey(ro_soc_model="SM8650"))
    assert list(wrong_hexagon(skels, sm8650)) == []
    assert list(wrong_hexagon(skels[:1], sm8650)) != []
    assert list(wrong_hexagon(skels[:1], facts_of(survey()))) == []  # no SoC is known


def test_what_the_recipe_requires_is_looked_up(
    phone: Phone, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    target = make_target("adb", request, tmp_path)
    for require in ({"soc": "SM8650"}, {"htp": "v75", "machine": "x86_64"}, {"htp": "V75"}):
        target.device = replace(target.device, require=require)
        assert target.deploy(target.file("a", b"1"), dry_run=True) == 0
    target.device = replace(target.device, require={"htp": "v79"})
    with pytest.raises(DeviceRefused, match="htp must be v79, and is v75"):
        target.deploy(target.file("a", b"1"))
    target.device = replace(target.device, require={"chip": "BM1684X"})
    with pytest.raises(DeviceRefused, match="chip must be BM1684X, and is not known"):
        target.deploy(target.file("a", b"1"))


def qnn(target: Target, builds: dict[str, str]) -> list[Any]:
    return [
        target.file(name, elf(HEXAGON if "Skel" in name else AARCH64, 0x75, build=build))
        for name, build in builds.items()
    ]


def test_the_qnn_libraries_are_complete_and_of_one_build(local: Target) -> None:
    """A stub of one release and a skel of another fail on the phone with 4000 or 14001."""
    whole = dict.fromkeys(
        ["libQnnHtp.so", "libQnnSystem.so", "libQnnHtpV75Stub.so", "libQnnHtpV75Skel.so"], BUILD
    )
    assert list(qnn_set(qnn(local, whole))) == []
    mixed = {**whole, "libQnnHtpV75Skel.so": OTHER}
    (problem,) = qnn_set(qnn(local, mixed))
    assert BUILD in problem
    assert OTHER in problem
    for missing in whole:
        rest = {name: build for name, build in whole.items() if name != missing}
        assert list(qnn_set(qnn(local, rest))) != [], missing
    assert list(qnn_set(qnn(local, {"libQnnLLaMAPackage_HTP.so": ""}))) == []


def test_a_qnn_build_across_blocks_is_found(tmp_path: Path) -> None:
    path = tmp_path / "libQnnHtp.so"
    text = f"v{BUILD}_9\0".encode()
    path.write_bytes(elf(AARCH64).ljust((1 << 20) - 10, b"x") + text + b"x" * 100)
    assert look(str(path)).qnn == BUILD


def test_a_bmodel_for_another_chip_is_refused(local: Target) -> None:
    description = b"\0\0model\0BM1684\0net\0"
    head = struct.pack("<IIII", 0xFF55AAEE, 64, len(description), 0).ljust(64, b"\0")
    model = local.file("llm.bmodel", head + description + b"BM1688")
    assert bmodel_chips(model.path) == {"BM1684"}
    (problem,) = wrong_chips([model], facts_of(survey(chip="BM1684X")))
    assert problem == "llm.bmodel is for BM1684, not for BM1684X"
    assert list(wrong_chips([model], facts_of(survey(chip="BM1684")))) == []
    torn = local.file("torn.bmodel", b"\0" * 100)
    assert bmodel_chips(torn.path) == set()


def test_facts_are_remembered_while_the_file_is_the_same(tmp_path: Path) -> None:
    import hashlib
    import os

    path, memory = tmp_path / "file", tmp_path / "memory"
    path.write_bytes(b"A" * 100)
    known = HostFiles(str(memory))
    assert known.of(str(path)).sha256 == hashlib.sha256(b"A" * 100).hexdigest()
    before = path.stat()
    path.write_bytes(b"B" * 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known.of(str(path)).sha256 == hashlib.sha256(b"B" * 100).hexdigest()
    known.save()
    for damage in ("", "{", '{"version": 9}'):
        memory.write_text(damage)
        assert HostFiles(str(memory)).of(str(path)).size == 100


class Journal:
    """A plan of four artifacts of one model, and what their journal lines say."""

    def __init__(self) -> None:
        self.producer = {
            name: name for name in ("rotation.bin", "int8.pth", "int8.mllm", "q4.mllm")
        }
        self.steps = {
            "rotation.bin": Made({}),
            "int8.pth": Made({"rotation": [Named("rotation.bin")]}),
            "int8.mllm": Made({"checkpoint": [Named("int8.pth")]}),
            "q4.mllm": Made({"rotation": [Named("rotation.bin")]}),
        }


class Made:
    def __init__(self, inputs: dict[str, list[Named]]) -> None:
        self.inputs = inputs


class Named:
    kind = "artifact"

    def __init__(self, name: str) -> None:
        self.name = name


def line(**inputs: str) -> dict[str, Any]:
    return {"parts": {"inputs": {name: [[name, digest]] for name, digest in inputs.items()}}}


def test_files_of_different_rotations_are_refused(local: Target) -> None:
    """The NPU's int8 model and the CPU's q4k must share one rotation, and nothing else shows it."""
    plan: Any = Journal()
    same = {"int8.pth": line(rotation="r1"), "q4.mllm": line(rotation="r1")}
    check_rotations(plan, same, ["int8.mllm", "q4.mllm"], [])
    mixed = {"int8.pth": line(rotation="r1"), "q4.mllm": line(rotation="r2")}
    with pytest.raises(DeviceRefused, match="different rotations") as caught:
        check_rotations(plan, mixed, ["int8.mllm", "q4.mllm"], [])
    assert "r1: int8.mllm" in caught.value.message
    assert "r2: q4.mllm" in caught.value.message


def test_a_rotation_written_in_a_file_counts_too(local: Target) -> None:
    header = json.dumps({"__metadata__": {"qbuild.rotation": "r9"}}).encode()
    content = struct.pack("<Q", len(header)) + header
    file = local.file("model.safetensors", content)
    plan: Any = Journal()
    with pytest.raises(DeviceRefused, match=r"r9: model\.safetensors"):
        check_rotations(plan, {"q4.mllm": line(rotation="r2")}, ["q4.mllm"], [file])
    hostile = local.file("bad.safetensors", struct.pack("<Q", 2**63) + b"{")
    check_rotations(plan, {"q4.mllm": line(rotation="r2")}, ["q4.mllm"], [hostile])
