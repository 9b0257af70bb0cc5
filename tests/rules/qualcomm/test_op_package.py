"""Rule `htp-op-package` against stand-ins for the SDKs: what it checks, runs and hands over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from buildsys.errors import StepError
from buildsys.formats.elf_file import read_elf_header
from buildsys.rules.qualcomm.op_sources import find_op_sources
from buildsys.rules.qualcomm.targets import machine
from buildsys.share import shared_folder
from buildsys.toolchains.finding import Found, find_toolchains
from tests.rules.conftest import Made, Runner
from tests.rules.qualcomm.standin import Sdks, make_package, make_sdks

ALL = "qnn-sdk+hexagon-sdk+android-ndk"


@pytest.fixture(scope="module")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> Sdks:
    return make_sdks(tmp_path_factory.mktemp("sdks"))


def found(sdks: Sdks) -> Found:
    return find_toolchains([ALL], [shared_folder("toolchains")], sdks.environment).found[ALL]


@pytest.fixture
def build(make: Runner, sdks: Sdks, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """build(sources, options...): the step as the engine runs it."""
    monkeypatch.setenv("PATH", sdks.environment["PATH"])
    sdks.calls()

    def run(sources: Path, target: str = "htp_v75", **more: Any) -> Made:
        inputs = {"sources": sources, **more.pop("inputs", {})}
        outputs = more.pop("outputs", {})
        made: Made = make(
            "htp-op-package",
            f"htp/{target}/libQnnToyPackage.so",
            inputs,
            {"target": target, **more},
            toolchain=found(sdks).fields,
            outputs=outputs,
        )
        return made

    return run


@pytest.mark.parametrize("target", ["htp_v73", "htp_v75", "htp_v79", "htp_x86", "htp_aarch64"])
def test_a_package_comes_out_for_the_machine_that_was_asked_for(
    build: Runner, tmp_path: Path, target: str
) -> None:
    made = build(make_package(tmp_path), target)
    header = read_elf_header(made.out)
    assert (header.machine, header.kind) == (machine(target), "shared object")
    assert made.notes["package"] == "ToyPackage"
    assert made.notes["qnn"] == "2.40.0.251030"
    assert b"ToyPackageInterfaceProvider" in made.out.read_bytes()


def test_nothing_is_written_beside_the_sources_and_the_bytes_repeat(
    build: Runner, tmp_path: Path
) -> None:
    package = make_package(tmp_path)
    before = sorted(package.rglob("*"))
    one = build(package).out.read_bytes()
    assert build(package).out.read_bytes() == one
    moved = package.rename(tmp_path / "elsewhere")
    assert build(moved, package="ToyPackage").out.read_bytes() == one
    assert [path.name for path in sorted(moved.rglob("*"))] == [path.name for path in before]


def test_sources_may_lie_behind_spaces_and_sdks_may_not(
    build: Runner, tmp_path: Path, sdks: Sdks, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(make_package(tmp_path / "my projects"))
    spaced = tmp_path / "my sdk"
    spaced.symlink_to(sdks.qnn)
    fields = {**found(sdks).fields, "qnn-sdk.root": str(spaced)}
    monkeypatch.setattr(sys.modules[__name__], "found", lambda _: Found(fields, {}))
    with pytest.raises(StepError, match="make splits paths at spaces"):
        build(make_package(tmp_path / "again"))


def test_make_runs_as_many_jobs_as_the_step_has_threads(
    build: Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    build(make_package(tmp_path))
    assert any(" -j2 htp_v75" in record.getMessage() for record in caplog.records)


def test_compile_commands_are_those_that_make_runs(
    build: Runner, tmp_path: Path, sdks: Sdks
) -> None:
    package = make_package(tmp_path)
    made = build(package, outputs={"compile_commands": "compile_commands.json"})
    entries = json.loads(made.output("compile_commands").read_text())
    # Where make ran is not where the sources are: there alone they differ.
    ran = {tuple(filter(is_of_the_sources, argv)) for _, argv in sdks.calls() if "-c" in argv}
    names = {str(sdks.qnn): "QNN", str(sdks.hexagon): "HEXAGON"}
    told = set()
    for entry in entries:
        assert entry["directory"] == str(package)
        assert (package / entry["file"]).is_file()
        assert Path(entry["arguments"][0]).name == "hexagon-clang++"
        words = entry["arguments"][1:]
        for place, name in names.items():
            words = [word.replace(place, name) for word in words]
        told.add(tuple(words))
    assert told == ran
    assert len(told) == 3


def is_of_the_sources(word: str) -> bool:
    return not word.startswith("-fdebug-prefix-map=")


@pytest.mark.parametrize(
    "place", ["LLaMAOpPackageHtp/LLaMAPackage", "mllm/backends/qnn/custom-op-package/LLaMAPackage"]
)
def test_both_layouts_of_mllm_are_found(place: str, tmp_path: Path) -> None:
    folder = make_package(tmp_path / Path(place).parent, "LLaMAPackage")
    for given in (folder, tmp_path):
        sources = find_op_sources(given, None)
        assert (sources.folder, sources.package) == (folder, "LLaMAPackage")
        assert sources.makefile is None


def test_a_makefile_one_level_too_high_is_found_and_run(
    build: Runner, make: Runner, tmp_path: Path, sdks: Sdks
) -> None:
    package = make_package(tmp_path / "ToyOpPackageHtp")
    with pytest.raises(StepError, match=r"there is no Makefile in .*ToyPackage, nor one level"):
        build(package.parent, own_makefile=True)
    makefile = make("htp-makefile", "Makefile", options={"package": "Other"}).out
    shutil.copyfile(makefile, package.parent / "Makefile")
    with (package.parent / "Makefile").open("a") as file:
        file.write("COMMON += -DTHEIR_OWN\n")
    sdks.calls()
    built = build(package.parent, own_makefile=True)
    assert "hexagon_tools" not in built.notes
    assert all("-DTHEIR_OWN" in argv for _, argv in sdks.calls() if "-c" in argv)
    assert built.notes["package"] == "ToyPackage"


def test_a_makefile_of_the_recipe_is_run(build: Runner, make: Runner, tmp_path: Path) -> None:
    options = {"package": "ToyPackage", "flags": ["-DGIVEN"]}
    makefile = make("htp-makefile", "Makefile", options=options).out
    package = make_package(tmp_path)
    (package / "src/ops/Add.cpp").write_text("#ifndef GIVEN\n#error not given\n#endif\n")
    build(package, inputs={"makefile": makefile})
    with pytest.raises(StepError, match="not given"):
        build(package)


def test_a_folder_without_a_package_or_with_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="there is no op package in"):
        find_op_sources(tmp_path, None)
    for name in ("One", "Two"):
        make_package(tmp_path, name)
    with pytest.raises(StepError, match=r"several op packages in .*: One, Two"):
        find_op_sources(tmp_path, None)
    assert find_op_sources(tmp_path, "Two").folder == tmp_path / "Two"
    with pytest.raises(StepError, match="no op package called Three"):
        find_op_sources(tmp_path, "Three")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '#include "HTP/core/op_stub.h"',
            r"Add\.cpp includes HTP/core/op_stub\.h, which QNN",
        ),
        ("#include <QnnOpPackage.h>", r"Add\.cpp includes QnnOpPackage\.h, which QNN SDK 2\.40"),
        ("DEF_TENSOR_PROPERTIES(x)", "uses DEF_TENSOR_PROPERTIES, which the headers of QNN SDK"),
    ],
)
def test_headers_of_another_version_are_told_before_anything_is_compiled(
    build: Runner, tmp_path: Path, sdks: Sdks, line: str, said: str
) -> None:
    package = make_package(tmp_path)
    (package / "src/ops/Add.cpp").write_text(f"{line}\n")
    with pytest.raises(StepError, match=said) as told:
        build(package)
    assert "set QNN_SDK_ROOT" in str(told.value)
    assert sdks.calls() == []


def test_what_the_headers_have_is_no_mistake(build: Runner, tmp_path: Path) -> None:
    package = make_package(tmp_path)
    text = '#include "HTP/core/constraints.h"\nauto f = &get_interface_scale;\n'
    (package / "src/ops/Add.cpp").write_text(text)
    build(package)
    with pytest.raises(StepError, match=r"written for QNN SDK 2\.41, and 2\.40\.0\.251030 is inst"):
        build(package, qnn_version="2.41")


def test_tools_that_do_not_know_the_arch_are_refused(
    build: Runner, tmp_path: Path, sdks: Sdks
) -> None:
    package = make_package(tmp_path)
    for given, said in (
        ({"v79": {"tools": "8.7.06"}}, r"tools 8\.7\.06 do not know v79: 8\.8 is the first to"),
        ({"v79": {"tools": "8.8.02"}}, r"has no tools 8\.8\.02, but: 8\.4\.09, 8\.5\.03, 8\.7\.06"),
        ({"v79": {"sdk": "/opt/sdk"}}, "an arch needs its `tools` too"),
    ):
        with pytest.raises(StepError, match=said):
            build(package, "htp_v79", archs=given)
    assert sdks.calls() == []


def test_where_the_usual_tools_are_not_installed_the_newest_able_ones_are_taken(
    build: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_sdks(tmp_path / "own", "6.4.0.2")
    tools = own.hexagon / "tools" / "HEXAGON_Tools"
    (tools / "8.7.06").rename(tools / "8.8.06")
    monkeypatch.setattr(sys.modules[__name__], "found", lambda _: found_in(own))
    assert build(make_package(tmp_path)).notes["hexagon_tools"] == "19.0.04"
    for name in ("8.8.06", "19.0.04"):
        shutil.rmtree(tools / name)
    with pytest.raises(StepError, match=r"no tools of the Hexagon SDK know v75 \(there: 8\.4"):
        build(make_package(tmp_path / "again"))


found_in = found


def test_what_the_compiler_says_is_shown(build: Runner, tmp_path: Path) -> None:
    package = make_package(tmp_path)
    (package / "src/ops/Add.cpp").write_text("int add(int x) { return y; }\n")
    with pytest.raises(StepError, match=r"(?s)make failed \(exit code 2\).*Add\.cpp:1:.*'y'"):
        build(package)


def test_a_library_for_another_machine_is_no_result(
    build: Runner, make: Runner, tmp_path: Path
) -> None:
    """A Makefile that compiles everything for v73, whatever it is asked for."""
    makefile = make("htp-makefile", "Makefile", options={"package": "ToyPackage"}).out
    text = makefile.read_text() + "htp_v75: build/hexagon-v73/$(LIBRARY)\n"
    text += "\tmkdir -p build/hexagon-v75 && cp $< build/hexagon-v75\n"
    makefile.write_text(text.replace("htp_v75: build/hexagon-v75/$(LIBRARY)\n", ""))
    with pytest.raises(StepError, match=r"should be .* for Hexagon v75, and is a .*v73"):
        build(make_package(tmp_path), inputs={"makefile": makefile})


RECIPE = """\
qbuild: 1
name: ops
sources: {package: {folder: ToyPackage}}
artifacts:
  "htp/${target}/libQnnToyPackage.so":
    matrix: {target: [htp_v75, htp_aarch64]}
    rule: htp-op-package
    inputs: {sources: package}
    options: {target: "${target}"}
    outputs: {compile_commands: "htp/${target}/compile_commands.json"}
    optional: true
"""


def test_a_recipe_takes_the_ndk_for_android_alone(tmp_path: Path, sdks: Sdks) -> None:
    make_package(tmp_path)
    (tmp_path / "ops.yaml").write_text(RECIPE)
    environment = {**os.environ, **sdks.environment, "QBUILD_CACHE": "", "COLUMNS": "80"}
    environment.pop("ANDROID_NDK_ROOT")

    def qbuild(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "buildsys", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    built = qbuild("all", "ops.yaml")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "build/ops/htp/htp_v75/libQnnToyPackage.so").is_file()
    skipped = qbuild("status").stdout
    assert "skipped  htp/htp_aarch64" in skipped
    assert "fresh    htp/htp_v75" in skipped
    environment["ANDROID_NDK_ROOT"] = str(sdks.ndk)
    built = qbuild("all", "ops.yaml")
    assert built.returncode == 0, built.stderr
    assert "nothing to do" in qbuild("all", "ops.yaml").stdout
    # Another SDK is another package: its version is part of the key.
    (sdks.qnn / "sdk.yaml").write_text("version: 2.41.0.1\n")
    told = qbuild("why", "htp/htp_v75/libQnnToyPackage.so").stdout
    assert 'qnn-sdk, version: "2.40.0.251030" -> "2.41.0.1"' in told
    (sdks.qnn / "sdk.yaml").write_text("name: stand-in\nversion: 2.40.0.251030\n")
