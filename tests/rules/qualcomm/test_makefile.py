"""Rule `htp-makefile`: the Makefile that stands on its own, against stand-ins for the SDKs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from buildsys.formats.elf_file import read_elf_header
from buildsys.rules.qualcomm.targets import TARGETS, machine, output_folder
from tests.rules.conftest import Runner
from tests.rules.qualcomm.standin import Sdks, make_package, make_sdks

COMMON = [
    *("-std=c++17", "-IQNN/include/QNN", "-fPIC", "-Wall", "-Wreorder", "-Wno-missing-braces"),
    *("-Wno-unused-function", "-Werror", "-Wno-format", "-Wno-unused-command-line-argument"),
    *("-fvisibility=default", "-stdlib=libc++"),
    '-DQNN_API=__attribute__((visibility("default")))',
    '-D__QAIC_HEADER_EXPORT=__attribute__((visibility("default")))',
    *("-DTHIS_PKG_NAME=ToyPackage", "-MMD", "-MP"),
    "-fdebug-prefix-map=PACKAGE=.",
]
TOOLS = {"v68": "8.4.09", "v69": "8.5.03", "v73": "8.7.06", "v75": "8.7.06"}
TOOLS |= {"v79": "19.0.04", "v81": "19.0.04"}
NATIVE = "HEXAGON/tools/HEXAGON_Tools/8.7.06/Tools/libnative"
NDK = "NDK/toolchains/llvm/prebuilt/linux-x86_64"


@pytest.fixture(scope="module")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> Sdks:
    return make_sdks(tmp_path_factory.mktemp("sdks"))


@pytest.fixture
def package(make: Runner, tmp_path: Path, sdks: Sdks) -> Path:
    """Sources with the generated Makefile beside them."""
    folder = make_package(tmp_path)
    made = make("htp-makefile", "Makefile", options={"package": "ToyPackage"})
    (folder / "Makefile").write_bytes(made.out.read_bytes())
    sdks.calls()
    return folder


def run_make(
    package: Path, sdks: Sdks, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=package,
        env={**os.environ, **sdks.environment, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def hexagon_flags(arch: str) -> list[str]:
    qurt = f"-IHEXAGON/rtos/qurt/compute{arch}/include"
    flags = [f"-m{arch}", "-mhvx", "-mhvx-length=128B", "-mhmx", "-DUSE_OS_QURT", "-O2"]
    flags += ["-Wno-reorder", "-DPREPARE_DISABLED", f"{qurt}/qurt", f"{qurt}/posix"]
    return [*COMMON, *flags, "-IHEXAGON/incs", "-IHEXAGON/incs/stddef"]


def compilations(folder: str, flags: list[str], op_flags: list[str]) -> list[list[str]]:
    """Of the three sources, in the order in which make takes them."""
    rows = []
    for name in ("ToyPackageInterface", "ops/Add", "ops/SiLU"):
        own = flags + (op_flags if name.startswith("ops/") else [])
        rows.append([*own, "-c", f"src/{name}.cpp", "-o", f"build/{folder}/{name}.o"])
    return rows


def calls(package: Path, sdks: Sdks) -> list[tuple[str, list[str]]]:
    return [
        (program, [word.replace(str(package), "PACKAGE") for word in argv])
        for program, argv in sdks.calls()
    ]


def objects(folder: str) -> list[str]:
    return [f"build/{folder}/{name}.o" for name in ("ToyPackageInterface", "ops/Add", "ops/SiLU")]


@pytest.mark.parametrize("arch", sorted(TOOLS))
def test_command_lines_of_a_hexagon_target(package: Path, sdks: Sdks, arch: str) -> None:
    done = run_make(package, sdks, f"htp_{arch}")
    assert done.returncode == 0, done.stderr
    folder, library = f"hexagon-{arch}", f"build/hexagon-{arch}/libQnnToyPackage.so"
    link = ["-fPIC", "-std=c++17", "-g", "-shared", "-o", library, *objects(folder)]
    compiler = f"HEXAGON/tools/HEXAGON_Tools/{TOOLS[arch]}/Tools/bin/hexagon-clang++"
    expected = [*compilations(folder, hexagon_flags(arch), []), link]
    assert calls(package, sdks) == [(compiler, argv) for argv in expected]
    assert read_elf_header(package / library).machine == f"Hexagon {arch}"


def test_command_lines_of_x86(package: Path, sdks: Sdks) -> None:
    done = run_make(package, sdks, "htp_x86")
    assert done.returncode == 0, done.stderr
    folder = "x86_64-linux-clang"
    flags = [*COMMON, "-D__HVXDBL__", "-ffast-math", "-fomit-frame-pointer"]
    flags += ["-Wno-invalid-offsetof", f"-I{NATIVE}/include", "-DUSE_OS_LINUX"]
    link = ["-fPIC", "-std=c++17", "-g", "-shared", "-stdlib=libc++", "-o"]
    link += [f"build/{folder}/libQnnToyPackage.so", *objects(folder), "-Wl,--whole-archive"]
    link += [f"-L{NATIVE}/lib", "-lnative", "-Wl,--no-whole-archive", "-lpthread"]
    expected = [*compilations(folder, flags, []), link]
    assert calls(package, sdks) == [("clang++", argv) for argv in expected]
    made = package / "build" / folder / "libQnnToyPackage.so"
    assert read_elf_header(made).machine == "x86-64"
    listed = subprocess.run(["nm", "-D", made], capture_output=True, text=True, check=True).stdout
    assert " T native\n" in listed  # the whole archive is in it
    assert " T ToyPackageInterfaceProvider\n" in listed


def test_command_lines_of_android(package: Path, sdks: Sdks) -> None:
    done = run_make(package, sdks, "htp_aarch64")
    assert done.returncode == 0, done.stderr
    folder = "aarch64-android"
    target = ["--target=aarch64-none-linux-android21", f"--sysroot={NDK}/sysroot"]
    target += ["-stdlib=libc++", "-static-libstdc++"]
    flags = [*target, *COMMON, "-D__HVXDBL__", "-ffast-math", "-fomit-frame-pointer"]
    flags += ["-Wno-invalid-offsetof", f"-I{NATIVE}/include", "-DANDROID"]
    link = [*target, "-fPIC", "-std=c++17", "-g", "-shared", "-o"]
    link += [f"build/{folder}/libQnnToyPackage.so", *objects(folder)]
    link += ["-LQNN/lib/aarch64-android", "-lQnnHtp", "-lQnnHtpPrepare"]
    expected = [*compilations(folder, flags, ["-DREFERENCE_OP"]), link]
    assert calls(package, sdks) == [(f"{NDK}/bin/clang++", argv) for argv in expected]
    made = package / "build" / folder / "libQnnToyPackage.so"
    assert read_elf_header(made).machine == "AArch64"


def test_a_changed_header_rebuilds_what_includes_it_and_nothing_else(
    package: Path, sdks: Sdks
) -> None:
    def compiled(*words: str) -> list[str]:
        done = run_make(package, sdks, "htp_v75", *words)
        assert done.returncode == 0, done.stderr
        return [Path(argv[argv.index("-o") + 1]).name for _, argv in sdks.calls()]

    library = "libQnnToyPackage.so"
    assert compiled() == ["ToyPackageInterface.o", "Add.o", "SiLU.o", library]
    assert compiled() == []
    (package / "src/ops/common.h").touch()
    assert compiled() == ["Add.o", "SiLU.o", library]
    (package / "src/ops/Add.cpp").touch()
    assert compiled() == ["Add.o", library]
    # A header that is gone, and that nothing includes any more, is no error.
    (package / "src/ops/common.h").rename(package / "src/ops/other.h")
    for name in ("Add", "SiLU"):
        file = package / "src" / "ops" / f"{name}.cpp"
        file.write_text(file.read_text().replace("common.h", "other.h"))
    assert compiled() == ["Add.o", "SiLU.o", library]
    (package / "Makefile").touch()
    assert len(compiled()) == 4


@pytest.mark.parametrize("target", [*TARGETS, "all", "clean"])
def test_make_warns_of_no_undefined_variable(package: Path, sdks: Sdks, target: str) -> None:
    done = run_make(package, sdks, "-n", "--warn-undefined-variables", target)
    assert done.returncode == 0
    assert done.stderr == ""


def test_assembly_is_taken_from_the_folder_of_its_own_arch(package: Path, sdks: Sdks) -> None:
    """Qualcomm's own Makefiles link v75's into v79."""
    for folder in ("v75_asm", "v79_asm", "x86_asm", "android_asm"):
        (package / "src" / "ops" / folder).mkdir()
        (package / "src" / "ops" / folder / f"only_{folder}.S").write_text("\n")
    for target, folder in (
        ("htp_v75", "v75_asm"),
        ("htp_v79", "v79_asm"),
        ("htp_v73", None),
        ("htp_x86", "x86_asm"),
        ("htp_aarch64", "android_asm"),
    ):
        told = run_make(package, sdks, "-n", target).stdout
        named = {word for word in told.split() if word.endswith(".S")}
        assert named == ({f"src/ops/{folder}/only_{folder}.S"} if folder else set())


def test_everything_of_an_arch_can_be_overridden(
    make: Runner, package: Path, sdks: Sdks, tmp_path: Path
) -> None:
    v69 = {
        "tools": "19.0.04",
        "sdk": "$(HEXAGON_SDK_ROOT)/../other",
        "qurt": "computev68",
        "flags": ["-DOWN=1"],
        "link_flags": ["-Wl,-z,now"],
    }
    options = {
        "package": "ToyPackage",
        "archs": {"v69": v69, "x86": {"compiler": "g++"}},
        "flags": ["-O3"],
        "all": ["htp_v69"],
    }
    (package / "Makefile").write_bytes(
        make("htp-makefile", "Makefile", options=options).out.read_bytes()
    )
    (sdks.hexagon.parent / "other").symlink_to(sdks.hexagon)
    told = run_make(package, sdks, "-n").stdout
    (sdks.hexagon.parent / "other").unlink()
    sdk = f"{sdks.hexagon}/../other"
    assert f"{sdk}/tools/HEXAGON_Tools/19.0.04/Tools/bin/hexagon-clang++" in told
    assert f"-I{sdk}/rtos/qurt/computev68/include/qurt" in told
    assert " -O3 " in told
    assert " -DOWN=1 -c " in told
    assert "-shared -Wl,-z,now -o build/hexagon-v69/libQnnToyPackage.so" in told
    assert run_make(package, sdks, "-n", "htp_x86").stdout.startswith("mkdir -p")
    assert "\ng++ " in run_make(package, sdks, "-n", "htp_x86").stdout
    # And once more on the command line.
    own = run_make(package, sdks, "-n", "htp_v69", "HEXAGON_TOOLS_VERSION_V69=8.5.03")
    assert "there is no src" not in own.stderr


@pytest.mark.parametrize(
    ("target", "variables", "said"),
    [
        ("htp_v75", {"HEXAGON_SDK_ROOT": ""}, "the Hexagon SDK is not there"),
        ("htp_v75", {"QNN_SDK_ROOT": "/nowhere"}, "the QNN SDK is not there: /nowhere/include"),
        (
            "htp_v75",
            {"HEXAGON_TOOLS_VERSION_V75": "8.7.03"},
            "has no Hexagon tools 8.7.03, but: ",
        ),
        ("htp_aarch64", {"ANDROID_NDK_ROOT": "/nowhere"}, "the Android NDK is not there"),
        ("htp_aarch64", {"QNN_TARGET_LIB": "/nowhere"}, "QNN's libQnnHtp.so for Android is not"),
        ("build/hexagon-v75/libQnnToyPackage.so", {"HEXAGON_SDK_ROOT": ""}, "Set HEXAGON_SDK_ROOT"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_compiled(
    package: Path, sdks: Sdks, target: str, variables: dict[str, str], said: str
) -> None:
    done = run_make(package, sdks, target, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert sdks.calls() == []


def test_without_sources_it_says_where_it_belongs(package: Path, sdks: Sdks) -> None:
    (package / "src").rename(package / "other")
    assert "put this Makefile beside src/" in run_make(package, sdks, "htp_v75").stderr


def test_a_failed_compilation_leaves_no_object(package: Path, sdks: Sdks) -> None:
    (package / "src/ops/Add.cpp").write_text("int add(int x) { return y; }\n")
    done = run_make(package, sdks, "htp_v75")
    assert done.returncode == 2
    assert "Add.cpp:1:" in done.stderr
    made = {path.name for path in (package / "build").rglob("*") if path.is_file()}
    assert not {"Add.o", "libQnnToyPackage.so"} & made
    assert run_make(package, sdks, "clean").returncode == 0
    assert not (package / "build").exists()


def test_outputs_lie_where_mllm_looks_for_them() -> None:
    assert {target: output_folder(target) for target in TARGETS} == {
        **{f"htp_{arch}": f"hexagon-{arch}" for arch in TOOLS},
        "htp_x86": "x86_64-linux-clang",
        "htp_aarch64": "aarch64-android",
    }
    assert machine("htp_v75") == "Hexagon v75"
