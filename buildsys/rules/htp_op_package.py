"""Rule `htp-op-package`: libQnnPACKAGE.so for one target, from the package's sources.

First it is checked that all is there: the sources, the headers that they include, tools that know
the Hexagon. Then make runs, on a copy of the sources, and what it made is looked at.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.qualcomm.targets import ARCH_OPTIONS, MAKE_TEXT, TARGETS, toolchain_of
from buildsys.rules.spec import InputSpec, OutputSpec, Rule, StepContext

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.qualcomm.op_sources import OpSources

RULE = Rule(
    name="htp-op-package",
    doc="The shared object of a QNN op package, for one target, built with Qualcomm's SDKs.",
    inputs={
        "sources": InputSpec(
            "The package (src/, src/ops/), or a folder that has it somewhere in it: mllm's clone.",
            kinds=("artifact", "folder"),
        ),
        "makefile": InputSpec(
            "A Makefile, as rule htp-makefile writes it; without one it is made here.",
            required=False,
        ),
    },
    options={
        "target": {"enum": list(TARGETS), "description": "What it is for."},
        "package": {
            "type": ["string", "null"],
            "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
            "default": None,
            "description": "The package's name; null: that of its folder.",
        },
        "own_makefile": {
            "type": "boolean",
            "default": False,
            "description": "Run the Makefile that the sources bring, beside src/ or one level "
            "above it, in place of qbuild's.",
        },
        "qnn_version": {
            "type": ["string", "null"],
            "pattern": r"^\d+(\.\d+)*$",
            "default": None,
            "description": "The least version of the QNN SDK that the sources are written for.",
        },
        "archs": ARCH_OPTIONS,
        "flags": {
            "type": "array",
            "items": MAKE_TEXT,
            "default": [],
            "description": "Further flags of the compiler; text of make.",
        },
        "template": {
            "type": "string",
            "default": "htp_makefile.j2",
            "description": "File name of the Makefile's template.",
        },
    },
    outputs={
        "compile_commands": OutputSpec(
            "compile_commands.json, for editors: it names folders of this machine.", None
        ),
    },
    distributions=("jinja2",),
    toolchain="qnn-sdk+hexagon-sdk",
    toolchain_for=toolchain_of,
    threads=2,
    templates=("template",),
)
MAKEFILE = "Makefile.qbuild"


def make(step: StepContext) -> None:
    """Check, run make, check again. Raises StepError for what is missing or came out wrong."""
    from buildsys.rules.qualcomm.libraries import check_library
    from buildsys.rules.qualcomm.op_sources import check_headers, find_op_sources
    from buildsys.rules.qualcomm.programs import run_program
    from buildsys.rules.qualcomm.targets import chosen_tools, machine, output_folder

    options, target = step.options, step.options["target"]
    arch = target.removeprefix("htp_")
    sources = find_op_sources(step.one("sources").path, options["package"])
    check_qnn_version(step)
    include = Path(step.toolchain["qnn-sdk.root"]) / "include" / "QNN"
    check_headers(sources, include, step.toolchain["qnn-sdk.version"])
    given = dict(options["archs"].get(arch, {}))
    if makes_its_makefile(step):
        installed = installed_tools(step, given)
        given["tools"] = chosen_tools(arch, given.get("tools"), installed)
        step.note("hexagon_tools", given["tools"])
    check_programs(step, arch, given)
    work = step.out.parent / ".package"
    folder = laid_out(step, sources, work, {arch: given})
    command = ["make", "-f", f"../{MAKEFILE}", f"PACKAGE_NAME={sources.package}"]
    environment = roots(step)
    run_program(step, [*command, f"-j{step.threads}", target], folder, environment, " -o build/")
    library = folder / "build" / output_folder(target) / f"libQnn{sources.package}.so"
    check_library(library, machine(target))
    if "compile_commands" in step.outputs:
        write_compile_commands(step, [*command, "-n", "-B", target], folder, sources)
    library.rename(step.out)
    shutil.rmtree(work)
    step.note("package", sources.package)
    step.note("target", target)
    step.note("qnn", step.toolchain["qnn-sdk.version"])


def makes_its_makefile(step: StepContext) -> bool:
    """Is the Makefile qbuild's own, made here? Another one's tools are its own business."""
    return step.maybe("makefile") is None and not step.options["own_makefile"]


def check_qnn_version(step: StepContext) -> None:
    """Raises StepError where the SDK is older than the recipe says that the sources need."""
    from buildsys.toolchains.versions import version_of

    wanted, have = step.options["qnn_version"], step.toolchain["qnn-sdk.version"]
    if wanted is not None and version_of(have) < version_of(wanted):
        raise StepError(
            f"the sources are written for QNN SDK {wanted}, and {have} is installed",
            remedy="Set QNN_SDK_ROOT to that version.",
        )


def installed_tools(step: StepContext, given: dict[str, Json]) -> list[str]:
    """The versions of the Hexagon tools. An arch with an SDK of its own (text of make) is not
    looked into: then the version is what the recipe says, and make finds it or not."""
    if "sdk" in given:
        if "tools" not in given:
            raise StepError("with an `sdk` of its own, an arch needs its `tools` too")
        return [given["tools"]]
    folder = Path(step.toolchain["hexagon-sdk.root"]) / "tools" / "HEXAGON_Tools"
    return sorted(path.parent.name for path in folder.glob("*/Tools"))


def check_programs(step: StepContext, arch: str, given: dict[str, Json]) -> None:
    """Raises StepError without make, or without the host's compiler where that compiles."""
    needed = ["make", *([given.get("compiler", "clang++")] if arch == "x86" else [])]
    for program in needed:
        if shutil.which(program.split()[0]) is None:
            raise StepError(
                f"there is no {program} on PATH",
                remedy=f"Debian: apt install {'make' if program == 'make' else 'clang libc++-dev'}",
            )


def laid_out(step: StepContext, sources: OpSources, work: Path, archs: dict[str, Json]) -> Path:
    """A copy of the sources, with the Makefile above it: nothing is written beside the user's."""
    from buildsys.rules.qualcomm.makefile import render_makefile
    from buildsys.rules.script import find_template

    folder = work / sources.package
    shutil.copytree(sources.folder, folder, ignore=shutil.ignore_patterns("build", ".git"))
    makefile = work / MAKEFILE
    given = step.maybe("makefile")
    if given is not None:
        shutil.copyfile(given.path, makefile)
    elif step.options["own_makefile"]:
        if sources.makefile is None:
            raise StepError(
                f"there is no Makefile in {sources.folder}, nor one level above",
                remedy="Leave `own_makefile` out: qbuild has one.",
            )
        shutil.copyfile(sources.makefile, makefile)
    else:
        template, options = find_template(str(step.options["template"])), step.options
        text = render_makefile(
            template, sources.package, archs, options["flags"], [options["target"]]
        )
        makefile.write_text(text, encoding="utf-8", newline="")
    return folder


def roots(step: StepContext) -> dict[str, str]:
    """Where the SDKs are, by all the names that Makefiles know them by. Raises StepError for a path
    that make cannot take."""
    qnn, hexagon = step.toolchain["qnn-sdk.root"], step.toolchain["hexagon-sdk.root"]
    found = {"QNN_SDK_ROOT": qnn, "QAIRT_SDK_ROOT": qnn, "HEXAGON_SDK_ROOT": hexagon}
    ndk = step.toolchain.get("android-ndk.root")
    if ndk:
        found |= {"ANDROID_NDK_ROOT": ndk, "ANDROID_NDK": ndk}
    for name, path in found.items():
        if len(path.split()) != 1:
            raise StepError(
                f"make splits paths at spaces, and there is one in {path}",
                remedy=f"Set {name} to a path without: a link will do.",
            )
    return found


def write_compile_commands(
    step: StepContext, argv: list[str], folder: Path, sources: OpSources
) -> None:
    """What make runs, for the sources where the user has them."""
    import os
    import subprocess

    from buildsys.rules.qualcomm.compile_commands import compile_commands

    told = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, **roots(step)},
        capture_output=True,
        text=True,
        check=True,
    )
    text = compile_commands(told.stdout, sources.folder.resolve())
    step.outputs["compile_commands"].write_text(text, encoding="utf-8")
