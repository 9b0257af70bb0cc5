"""Stand-ins for Qualcomm's SDKs and the NDK: the layout that Makefiles count on, with compilers
that write down how they are called and then hand over to a real one (zig's clang, gcc).

Nothing in it is Qualcomm's: headers and libraries are a few lines of our own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hexagon.emulator import toolchain

TOOLS = ("8.4.09", "8.5.03", "8.7.06", "19.0.04")
RECORDER = """\
#!{python} -IS
import json, os, re, sys
argv = sys.argv[1:]
try:
    with open({log!r}, "a") as log:
        log.write(json.dumps({{"tool": sys.argv[0], "argv": argv}}) + "\\n")
except PermissionError:
    pass  # a confined step
arch = re.search(r"hexagon-v(\\d+)", " ".join(argv))
real = [word.replace("ARCH", arch[1] if arch else "") for word in {real!r}]
kept = [word for word in argv if not re.match({dropped!r}, word)]
os.execv(real[0], [*real, *kept])
"""
# What only Qualcomm's and Google's compilers know, and what needs their C++ library.
DROPPED = r"-m(v\d|hvx|hmx|arch=)|-stdlib=|-static-libstdc|--target=|--sysroot="
ALONE = ["-nostdlib", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-Wno-unused"]
PLACE = "toolchains/llvm/prebuilt/linux-x86_64"


@dataclass(frozen=True)
class Sdks:
    """Where the stand-ins are, and the log of their compilers."""

    qnn: Path
    hexagon: Path
    ndk: Path
    programs: Path
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of make, or of a user's shell."""
        return {
            "QNN_SDK_ROOT": str(self.qnn),
            "HEXAGON_SDK_ROOT": str(self.hexagon),
            "ANDROID_NDK_ROOT": str(self.ndk),
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
        }

    def calls(self) -> list[tuple[str, list[str]]]:
        """Each call since the last question, in order: the program, relative to the stand-ins,
        and its arguments with their places written as names."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        found = [json.loads(line) for line in lines]
        return [(self._named(each["tool"]), [*map(self._named, each["argv"])]) for each in found]

    def _named(self, word: str) -> str:
        names = {self.qnn: "QNN", self.hexagon: "HEXAGON", self.ndk: "NDK"}
        for place, name in names.items():
            word = word.replace(str(place), name)
        return word.replace(f"{self.programs}/", "")


def make_sdks(folder: Path, hexagon_version: str = "5.5.0.1", qnn: str = "2.40.0.251030") -> Sdks:
    """The three of them below `folder`; skips the test where there is no make or gcc."""
    for tool in ("make", "gcc", "g++", "ar"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    sdks = Sdks(
        qnn=folder / "qairt",
        hexagon=folder / "Hexagon_SDK" / hexagon_version,
        ndk=folder / "ndk",
        programs=folder / "bin",
        log=folder / "calls.jsonl",
    )
    zig = compiler()
    _qnn(sdks, qnn, zig)
    _hexagon(sdks, zig)
    _write(sdks.ndk / "source.properties", "Pkg.Desc = Android NDK\nPkg.Revision = 26.3.11579264\n")
    (sdks.ndk / PLACE / "sysroot").mkdir(parents=True)
    android = [zig, "cc", "-target", "aarch64-linux-none", *ALONE]
    _recorder(sdks, sdks.ndk / PLACE / "bin" / "clang++", android)
    _recorder(sdks, sdks.programs / "clang++", [shutil.which("g++") or "g++"])
    return sdks


def compiler() -> str:
    return f"{toolchain().fields['root']}/ziglang/zig"


def _qnn(sdks: Sdks, version: str, zig: str) -> None:
    _write(sdks.qnn / "sdk.yaml", f"name: stand-in\nversion: {version}\n")
    _write(sdks.qnn / "bin" / "envsetup.sh", 'export PYTHONPATH="$QNN_SDK_ROOT/lib/python"\n')
    headers = sdks.qnn / "include" / "QNN"
    _write(headers / "QnnInterface.h", "#pragma once\n#ifndef QNN_API\n#error no QNN_API\n#endif\n")
    _write(headers / "HTP/core/constraints.h", "#pragma once\nfloat get_interface_scale(int);\n")
    libraries = sdks.qnn / "lib" / "aarch64-android"
    for name in ("QnnHtp", "QnnHtpPrepare"):
        source = _write(libraries / f"{name}.c", f"int {name}(void) {{ return 0; }}\n")
        _library([zig, "cc", "-target", "aarch64-linux-none", *ALONE], source, f"lib{name}.so")


def _hexagon(sdks: Sdks, zig: str) -> None:
    _write(sdks.hexagon / "setup_sdk_env.source", "")
    _write(sdks.hexagon / "incs" / "AEEStdDef.h", "#pragma once\n")
    for arch in ("v68", "v69", "v73", "v75", "v79", "v81"):
        _write(sdks.hexagon / f"rtos/qurt/compute{arch}/include/qurt/qurt.h", "#pragma once\n")
    hexagon = [zig, "cc", "-target", "hexagon-linux-none"]
    hexagon += ["-mcpu=hexagonvARCH+hvxvARCH+hvx_length128b", *ALONE]
    for version in TOOLS:
        tools = sdks.hexagon / "tools" / "HEXAGON_Tools" / version / "Tools"
        _recorder(sdks, tools / "bin" / "hexagon-clang++", hexagon)
        _write(tools / "libnative" / "include" / "native.h", "int native(void);\n")
        library = tools / "libnative" / "lib" / "libnative.a"
        library.parent.mkdir()
        source = _write(library.parent / "native.c", "int native(void) { return 1; }\n")
        made = library.parent / "native.o"
        subprocess.run(["gcc", "-fPIC", "-c", str(source), "-o", str(made)], check=True)
        subprocess.run(["ar", "rc", str(library), str(made)], check=True)


def _recorder(sdks: Sdks, program: Path, real: list[str]) -> None:
    text = RECORDER.format(python=sys.executable, log=str(sdks.log), real=real, dropped=DROPPED)
    _write(program, text).chmod(0o755)


def _library(compile_with: list[str], source: Path, name: str) -> None:
    made = source.parent / name
    argv = [*compile_with, "-fPIC", "-shared", str(source), "-o", str(made)]
    subprocess.run(argv, check=True, timeout=120)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_package(folder: Path, name: str = "ToyPackage") -> Path:
    """The sources of a small op package, laid out as mllm's is."""
    package = folder / name
    export = '__attribute__((visibility("default")))'
    interface = (
        f'#include "QnnInterface.h"\n#define NAME_OF(x) #x\n#define TEXT(x) NAME_OF(x)\n'
        f'extern "C" QNN_API const char* {name}InterfaceProvider() {{\n'
        f"    return TEXT(THIS_PKG_NAME);\n}}\n"
    )
    _write(package / "src" / f"{name}Interface.cpp", interface)
    op = '#include "common.h"\n' + f'extern "C" {export} int NAME(int x) {{ return twice(x); }}\n'
    for each in ("Add", "SiLU"):
        _write(package / "src" / "ops" / f"{each}.cpp", op.replace("NAME", each.lower()))
    _write(package / "src/ops/common.h", "inline int twice(int x) { return 2 * x; }\n")
    _write(package / "config" / f"{name}.xml", "<OpDefCollection/>\n")
    return package
