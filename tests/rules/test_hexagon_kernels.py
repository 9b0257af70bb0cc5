"""Rule `hexagon-kernels`: a shared object for the Hexagon that was asked for, and nothing less."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from buildsys.errors import StepError
from buildsys.formats.elf_file import read_elf_header
from buildsys.rules.hexagon_kernels import ARCHS, check, compiler_for
from tests.hexagon.emulator import toolchain
from tests.rules.conftest import Runner
from tests.rules.plans import plan_of

FUNCTIONS = {
    *("qbuild_quantize", "qbuild_dequantize_add", "qbuild_packed_size", "qbuild_pack_weights"),
    *("qbuild_matmul", "qbuild_silu_multiply", "qbuild_rms_norm"),
}


def exported(library: Path) -> set[str]:
    """The functions of its dynamic symbol table. Source: System V ABI, elf.h (32 bits)."""
    data = library.read_bytes()
    start, size, count = *struct.unpack_from("<I", data, 32), *struct.unpack_from("<HH", data, 46)
    sections = [struct.unpack_from("<10I", data, start + i * size) for i in range(count)]
    (symbols,) = (each for each in sections if each[1] == 11)  # SHT_DYNSYM
    names = sections[symbols[6]][4]
    found = set()
    for at in range(symbols[4], symbols[4] + symbols[5], 16):
        name, _, _, kind, _, section = struct.unpack_from("<3I2BH", data, at)
        if kind & 15 == 2 and section:  # a function, defined here
            found.add(data[names + name : data.index(b"\0", names + name)].decode())
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_gives_its_own_library_with_all_kernels(make: Runner, arch: str) -> None:
    name = f"hexagon/{arch}/libqbuild_kernels.so"
    made = make("hexagon-kernels", name, options={"arch": arch}, toolchain=toolchain().fields)
    header = read_elf_header(made.out)
    assert (header.machine, header.kind) == (f"Hexagon {arch}", "shared object")
    assert exported(made.out) == FUNCTIONS
    assert "not a QNN op package" in made.notes["kind"]
    assert b"not a QNN op package" in made.out.read_bytes()
    assert made.notes["compiler"].startswith("ziglang ")


def test_the_same_sources_give_the_same_bytes(make: Runner) -> None:
    twice = [
        make(
            "hexagon-kernels",
            "libkernels.so",
            options={"arch": "v75"},
            toolchain=toolchain().fields,
            outputs={"header": "kernels.h"},
        )
        for _ in range(2)
    ]
    assert twice[0].out != twice[1].out
    assert twice[0].out.read_bytes() == twice[1].out.read_bytes()
    assert "qbuild_matmul" in twice[0].output("header").read_text()


def test_a_users_own_kernels_are_compiled_beside_the_shipped_ones(
    make: Runner, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.h").write_text("int own_double(int);\n")
    (folder / "own.c").write_text(
        '#include "own.h"\n#include "hexagon_kernels.h"\n'
        '__attribute__((visibility("default"))) int own_double(int x) { return 2 * x; }\n'
    )
    given = {"sources": folder}
    fields = toolchain().fields
    made = make("hexagon-kernels", "a.so", given, {"arch": "v73"}, toolchain=fields)
    assert exported(made.out) == {*FUNCTIONS, "own_double"}
    alone = {"arch": "v73", "shipped": False}
    assert exported(make("hexagon-kernels", "a.so", given, alone, toolchain=fields).out) == {
        "own_double"
    }


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int f(void) { return 1 }\n", r"own\.c:1:.*expected ';'"),
        ("int g(void);\nint f(void) { return g(); }\n", "undefined symbol: g"),
    ],
)
def test_what_the_compiler_refuses_is_shown(
    make: Runner, tmp_path: Path, source: str, said: str
) -> None:
    own = tmp_path / "own.c"
    # Used by something that is exported: the linker looks at it.
    own.write_text(source.replace("int f", '__attribute__((visibility("default"))) int f'))
    with pytest.raises(StepError, match=f"(?s)zig failed.*{said}"):
        make("hexagon-kernels", "a.so", {"sources": own}, {"arch": "v75"}, toolchain=toolchain()[0])


def test_two_sources_of_one_name_are_refused(make: Runner, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.c").write_text("")
    given = {"sources": [tmp_path / "a" / "same.c", tmp_path / "b" / "same.c"]}
    with pytest.raises(StepError, match=r"two sources are called same\.c"):
        make("hexagon-kernels", "a.so", given, {"arch": "v75"}, toolchain=toolchain().fields)


def test_with_nothing_to_compile_the_recipe_is_refused() -> None:
    step, plan = plan_of("a.so", "hexagon-kernels", options={"shipped": False})
    assert [problem.message for problem in check(step, plan)] == ["there is nothing to compile"]


def test_debians_clang_is_told_in_its_own_words() -> None:
    argv = compiler_for({"program": "/usr/bin/clang-19", "version": "19"}, "v73")
    assert argv[0] == "/usr/bin/clang-19"
    assert {"-mv73", "-mhvx=v73", "-mhvx-length=128B"} <= {*argv}
    with pytest.raises(StepError, match="clang 19 does not know v75"):
        compiler_for({"program": "/usr/bin/clang-19", "version": "19"}, "v75")


@pytest.mark.skipif(shutil.which("clang-19") is None, reason="clang-19 is not installed")
def test_debians_clang_compiles_the_same_kernels(make: Runner) -> None:
    fields = {"program": shutil.which("clang-19") or "", "version": "19", "root": "/usr/bin"}
    made = make("hexagon-kernels", "a.so", options={"arch": "v73"}, toolchain=fields)
    assert exported(made.out) == FUNCTIONS
