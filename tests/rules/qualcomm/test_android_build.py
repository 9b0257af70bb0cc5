"""The cmake build of mllm's programs, with a stand-in for mllm and for the NDK."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from buildsys.formats.elf_file import read_elf_header
from tests.rules.qualcomm.standin import Sdks, make_sdks
from tests.rules.qualcomm.test_run_scripts import rendered

# What the NDK's own file tells cmake, as far as it counts here.
TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(NDK ${CMAKE_CURRENT_LIST_DIR}/../../toolchains/llvm/prebuilt/linux-x86_64)
set(CMAKE_CXX_COMPILER ${NDK}/bin/clang++)
set(CMAKE_CXX_COMPILER_WORKS ON)
set(CMAKE_EXE_LINKER_FLAGS "-static")
message(STATUS "told: ${ANDROID_ABI} ${ANDROID_STL} ${ANDROID_NATIVE_API_LEVEL} ${QNN}")
"""
# Like mllm: programs beside the sources, the SDK below them.
PROJECT = """\
cmake_minimum_required(VERSION 3.18)
project(mllm CXX)
set(EXECUTABLE_OUTPUT_PATH ${PROJECT_SOURCE_DIR}/bin-arm-qnn)
include_directories(mllm/backends/qnn/sdk/include/QNN)
add_executable(demo_qwen_npu demo.cpp)
add_executable(another demo.cpp)
"""
DEMO = "#define QNN_API\n#include <QnnInterface.h>\n" + 'extern "C" void _start() {}\n'


@pytest.fixture(scope="module")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> Sdks:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    made = make_sdks(tmp_path_factory.mktemp("sdks"))
    cmake = made.ndk / "build" / "cmake"
    cmake.mkdir(parents=True)
    (cmake / "android.toolchain.cmake").write_text(TOOLCHAIN)
    return made


@pytest.fixture
def mllm(tmp_path: Path) -> Path:
    folder = tmp_path / "mllm"
    (folder / "mllm/backends/qnn").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(PROJECT)
    (folder / "demo.cpp").write_text(DEMO)
    return folder


def run_script(
    work: Path, mllm: Path, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    work.mkdir()
    script = work / "build.sh"
    script.write_text(rendered("build_android_qnn.sh.j2", programs=["demo_qwen_npu"]))
    return subprocess.run(
        ["sh", str(script), *(words or (str(mllm), "out", "2"))],
        cwd=work,
        env={**os.environ, "ANDROID_NDK_ROOT": "", "QNN_SDK_ROOT": "", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_programs_come_out_and_nothing_is_written_into_the_clone(
    tmp_path: Path, sdks: Sdks, mllm: Path
) -> None:
    before = sorted(mllm.rglob("*"))
    done = run_script(tmp_path / "work", mllm, sdks.environment)
    assert done.returncode == 0, done.stderr
    assert "told: arm64-v8a c++_static android-28 ON" in done.stdout
    made = tmp_path / "work" / "out" / "demo_qwen_npu"
    assert read_elf_header(made).machine == "AArch64"
    assert [path.name for path in made.parent.iterdir()] == ["demo_qwen_npu"]
    assert sorted(mllm.rglob("*")) == before
    compiled = [argv for program, argv in sdks.calls() if "-c" in argv]
    assert all("-march=armv8.2-a+dotprod" in argv for argv in compiled)


def test_what_is_missing_is_named_before_cmake_runs(tmp_path: Path, sdks: Sdks, mllm: Path) -> None:
    own = sdks.environment
    for number, (environment, said) in enumerate(
        [
            ({**own, "ANDROID_NDK_ROOT": "/nowhere"}, "set ANDROID_NDK_ROOT to the NDK"),
            ({**own, "QNN_SDK_ROOT": "/nowhere"}, "set QNN_SDK_ROOT to the QNN SDK"),
        ]
    ):
        done = run_script(tmp_path / f"work{number}", mllm, environment)
        assert (done.returncode, done.stdout) == (3, "")
        assert said in done.stderr
    done = run_script(tmp_path / "other", tmp_path / "other", own)
    assert "the first argument is a clone of mllm" in done.stderr
    assert run_script(tmp_path / "none", mllm, own, "only").returncode == 2


def test_a_recipe_builds_them_as_a_command_step(tmp_path: Path, sdks: Sdks, mllm: Path) -> None:
    recipe = Path(__file__).resolve().parents[3] / "recipes" / "qwen2vl-npu.yaml"
    source = (mllm / "mllm/backends/qnn/LLaMAOpPackageHtp").resolve()
    source.mkdir()
    (mllm / "assets").mkdir()
    (mllm / "assets" / "bus.png").touch()
    text = (mllm / "CMakeLists.txt").read_text()
    (mllm / "CMakeLists.txt").write_text(text.replace("demo_qwen_npu", "demo_qwen2_vl_npu"))
    done = subprocess.run(
        [sys.executable, "-m", "buildsys", "build", recipe, "programs/", "-D", f"mllm={mllm}"],
        cwd=tmp_path,
        env={**os.environ, **sdks.environment, "QBUILD_CACHE": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    made = tmp_path / "build" / "qwen2vl-npu" / "programs" / "demo_qwen2_vl_npu"
    assert read_elf_header(made).machine == "AArch64"
