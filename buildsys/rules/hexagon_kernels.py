"""Rule `hexagon-kernels`: C with HVX intrinsics, compiled for Hexagon by a public compiler.

What comes out is a library of plain functions and no QNN op package: registering ops with QNN
takes headers of Qualcomm's SDK (rule htp-op-package). The kernels that come with qbuild are
templates/hexagon_kernels.c; buildsys/quant/fixed_point.py says, element by element, what they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.script import find_template
from buildsys.rules.spec import InputSpec, OutputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from buildsys.plan.graph import Plan, Step

ARCHS = ("v68", "v69", "v73", "v75", "v79", "v81")
KIND = "a library of plain functions for Hexagon; not a QNN op package, and QNN cannot load it"
# Nothing but what the sources say: no C library, no start files, no trap for undefined behaviour.
FLAGS = (
    *("-std=c11", "-O2", "-ffreestanding", "-fno-builtin", "-nostdlib", "-fno-stack-protector"),
    *("-fno-sanitize=all", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
)
LINKED = ("-shared", "-s", "-Wl,-z,defs", "-Wl,--build-id=none")


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """There is something to compile."""
    if not step.options["shipped"] and not step.inputs.get("sources"):
        yield Problem(
            "there is nothing to compile",
            "Give `sources`, or leave `shipped` true.",
            option="shipped",
        )


RULE = Rule(
    name="hexagon-kernels",
    doc="A shared object for Hexagon with HVX kernels: a kernel library, not a registered QNN op "
    "package.",
    inputs={
        "sources": InputSpec(
            "Further C files (.c, and the .h that they include), or folders of them.",
            kinds=("artifact", "file", "folder"),
            required=False,
            many=True,
        ),
    },
    options={
        "arch": {"enum": list(ARCHS), "description": "The Hexagon that it is for."},
        "shipped": {
            "type": "boolean",
            "default": True,
            "description": "With the kernels that come with qbuild: int8 quantize, dequantize-add, "
            "matmul, SiLU-multiply and RMSNorm.",
        },
        "source": {
            "type": "string",
            "default": "hexagon_kernels.c",
            "description": "The file of these kernels, in templates/ of the project or of qbuild.",
        },
        "header": {
            "type": "string",
            "default": "hexagon_kernels.h",
            "description": "Its header; every C file may include it.",
        },
    },
    outputs={"header": OutputSpec("The header, for those who call the kernels.", None)},
    toolchain="hexagon-llvm",
    templates=("source", "header"),
    check=check,
)


def make(step: StepContext) -> None:
    """Compile and link. Raises StepError with what the compiler said."""
    import shutil

    from buildsys.rules.qualcomm.libraries import check_library
    from buildsys.rules.qualcomm.programs import run_program

    work = step.out.parent / ".kernels"
    work.mkdir()
    sources = laid_out(step, work)
    compiler = compiler_for(step.toolchain, step.options["arch"])
    soname = f"-Wl,-soname,{step.out.name}"
    argv = [*compiler, *FLAGS, *LINKED, soname, *sources, "-o", "library.so"]
    run_program(step, argv, work, cache_of(work))
    check_library(work / "library.so", f"Hexagon {step.options['arch']}")
    (work / "library.so").rename(step.out)
    if "header" in step.outputs:
        shutil.copyfile(find_template(step.options["header"]), step.outputs["header"])
    step.note("kind", KIND)
    step.note("arch", step.options["arch"])
    step.note("compiler", compiler_name(step.toolchain))


def compiler_for(toolchain: Mapping[str, str], arch: str) -> list[str]:
    """The compiler, told which Hexagon. Raises StepError for one that is too old for it.

    Source: zig 0.17 takes HVX as features of the processor, clang as options of its own.
    """
    if toolchain.get("distribution") == "ziglang":
        processor = f"-mcpu=hexagon{arch}+hvx{arch}+hvx_length128b"
        zig = f"{toolchain['root']}/ziglang/zig"
        return [zig, "cc", "-target", "hexagon-linux-none", processor]
    if toolchain["version"] == "19" and ARCHS.index(arch) > ARCHS.index("v73"):
        raise StepError(
            f"clang 19 does not know {arch}: v73 is the last that it does",
            remedy="zig's clang does: qbuild toolchain install hexagon-llvm",
        )
    hvx = [f"-m{arch}", f"-mhvx={arch}", "-mhvx-length=128B"]
    return [toolchain["program"], "--target=hexagon-unknown-linux-musl", *hvx, "-fuse-ld=lld"]


def compiler_name(toolchain: Mapping[str, str]) -> str:
    """For the metadata: which compiler, in which version."""
    name = toolchain.get("distribution") or "clang"
    return f"{name} {toolchain['version']}"


def cache_of(work: Path) -> dict[str, str]:
    """zig keeps a cache; here it goes away with the step."""
    folder = str(work / "cache")
    return {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}


def laid_out(step: StepContext, work: Path) -> list[str]:
    """The sources under names that depend on no machine; those of the C files.

    Raises StepError for two of one name, and where there is no C file.
    """
    files = [path for given in step.inputs.get("sources", ()) for path in _files(given.path)]
    shipped = ("source", "header") if step.options["shipped"] else ("header",)
    files += [find_template(step.options[option]) for option in shipped]
    seen: dict[str, Path] = {}
    for path in files:
        if path.name in seen:
            message = f"two sources are called {path.name}: {seen[path.name]}, {path}"
            raise StepError(message)
        seen[path.name] = path
        (work / path.name).symlink_to(path.resolve())
    found = sorted(name for name in seen if name.endswith(".c"))
    if not found:
        raise StepError("there is no .c file among the sources")
    return found


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if file.suffix in (".c", ".h")]
    return [path]
