"""The scripts for Snapdragon phones: checked with shellcheck, run by dash and by a phone's shell.

The phone's is mksh with toybox's programs, Debian's build of what Android has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buildsys.rules.script import render
from buildsys.share import shared_folder
from tests.devices.packages import NoPackages, unpacked

# Writes down how it was started; like mllm it keeps a context where there is none.
DEMO = """\
#!/bin/sh
printf '%s\\n' "$LD_LIBRARY_PATH" "$ADSP_LIBRARY_PATH" "$@" > ../called
[ -e qnn_context.bin ] && printf 'loaded\\n' >> ../called
[ -e qnn_context.bin ] || printf 'graphs\\n' > qnn_context.bin
[ ! -e ../fail ] || exit 7
"""
NASTY = "it's $(touch pwned) a model.mllm"
NEEDED = ["printf", "stat", "sed", "sha256sum", "cat", "mv", "rm", "dirname"]


def rendered(template: str, **variables: Any) -> str:
    source = Path(shared_folder("templates"), template).read_text()
    return render(source, variables, template)


def shellcheck(script: Path) -> str:
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        # SC2016: "$(...)" in single quotes is what quoting a value is for.
        [program, "--shell=sh", "--enable=quote-safe-variables", "--exclude=SC2016", script],
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("run_qwen_qnn.sh.j2", {"program": "demo", "model": NASTY, "arch": "v75"}),
        (
            "run_qwen_qnn.sh.j2",
            {
                "program": "demo",
                "model": "m",
                "arch": "v79",
                "limit": 1000,
                "threads": 4,
                "needs": ["models/a b", NASTY],
            },
        ),
        ("build_android_qnn.sh.j2", {"programs": ["demo_qwen_npu", NASTY]}),
        ("build_android_qnn.sh.j2", {"programs": ["demo"], "options": ["-DAPK=OFF"], "api": 30}),
        ("run_cpu.sh.j2", {"program": "demo", "model": NASTY}),
    ],
)
def test_shellcheck_finds_nothing(template: str, variables: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(rendered(template, **variables))
    assert shellcheck(script) == ""


@pytest.fixture(params=["dash", "mksh"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """PATH and shell of a run: this machine's, or what a phone has and nothing else."""
    if request.param == "dash":
        found = shutil.which("dash")
        if found is None:
            pytest.skip("dash is not installed")
        yield {"shell": found, "path": os.environ["PATH"]}
        return
    try:
        programs = unpacked() / "root" / "bin"
    except NoPackages as error:
        pytest.skip(str(error))
    folder = tmp_path / "phone-bin"
    folder.mkdir()
    for name in NEEDED:
        (folder / name).symlink_to(programs / "toybox")
    (folder / "sh").symlink_to(programs / "mksh")
    yield {"shell": str(programs / "mksh"), "path": str(folder)}


class Phone:
    """A folder laid out as the device's root, and the script in it."""

    def __init__(self, root: Path, shell: dict[str, str], **variables: Any) -> None:
        self.root, self._shell = root, shell
        given = {"program": "demo", "model": "int8.mllm", "arch": "v75", **variables}
        libraries = ["libQnnHtp.so", "libQnnSystem.so", "libQnnHtpPrepare.so"]
        libraries += ["libQnnHtpV75Stub.so", "libQnnHtpV75Skel.so"]
        libraries += ["libQnnLLaMAPackage_CPU.so", "libQnnLLaMAPackage_HTP.so"]
        files = [f"models/{given['model']}", "vocab/vocab.mllm", "vocab/merges.txt"]
        for name in [*files, *(f"qnn-lib/{library}" for library in libraries)]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        (root / "bin").mkdir()
        (root / "bin" / "demo").write_text(DEMO)
        (root / "bin" / "demo").chmod(0o755)
        (root / "run.sh").write_text(rendered("run_qwen_qnn.sh.j2", **given))
        self.context = root / "bin" / "qnn_context.bin"

    def run(self, *words: str) -> tuple[int, list[str], str]:
        """Exit code, what the demo was called with, and what was said."""
        (self.root / "called").unlink(missing_ok=True)
        done = subprocess.run(
            [self._shell["shell"], str(self.root / "run.sh"), *words],
            env={"PATH": self._shell["path"]},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
        called = self.root / "called"
        return (
            done.returncode,
            called.read_text().splitlines() if called.exists() else [],
            (done.stderr),
        )

    def change(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)
        os.utime(self.root / name, (1_700_000_000, 1_700_000_000))


def test_the_demo_finds_its_libraries_and_files(tmp_path: Path, shell: dict[str, str]) -> None:
    phone = Phone(tmp_path / "a folder", shell, limit=1000, threads=4)
    code, called, said = phone.run("--verbose", "two words")
    assert (code, said) == (0, "")
    libraries = str(phone.root / "qnn-lib")
    assert called == [
        *(libraries, libraries, "--vocab", "../vocab/vocab.mllm"),
        *("--merge", "../vocab/merges.txt", "--model", "../models/int8.mllm"),
        *("--limits", "1000", "--thread", "4", "--verbose", "two words"),
    ]


def test_no_value_of_a_recipe_becomes_a_command(tmp_path: Path, shell: dict[str, str]) -> None:
    phone = Phone(tmp_path / "root", shell, model=NASTY)
    code, called, _ = phone.run()
    assert code == 0
    assert f"../models/{NASTY}" in called
    assert not list(tmp_path.rglob("pwned"))


def test_a_context_of_the_same_files_is_loaded(tmp_path: Path, shell: dict[str, str]) -> None:
    phone = Phone(tmp_path / "root", shell)
    assert phone.run()[1][-1] != "loaded"
    assert phone.run()[1][-1] == "loaded"
    # A copy of the same bytes with other times (a second `adb push`) is no other model.
    os.utime(phone.root / "models/int8.mllm", (1_600_000_000, 1_600_000_000))
    code, called, said = phone.run()
    assert (code, called[-1], said) == (0, "loaded", "")
    # And from then on the stamps are enough again.
    key = (phone.root / "bin/qnn_context.bin.key").read_text()
    assert "1600000000" in key


@pytest.mark.parametrize(
    "changed", ["models/int8.mllm", "qnn-lib/libQnnLLaMAPackage_HTP.so", "qnn-lib/libQnnHtp.so"]
)
def test_a_context_of_other_files_is_removed_and_made_anew(
    tmp_path: Path, shell: dict[str, str], changed: str
) -> None:
    phone = Phone(tmp_path / "root", shell)
    phone.run()
    text = (phone.root / changed).read_text()
    phone.change(changed, text[::-1])  # of the same size
    code, called, said = phone.run()
    assert code == 0
    assert called[-1] != "loaded"
    assert "was made from other files" in said
    assert phone.run()[1][-1] == "loaded"


def test_another_limit_is_another_context(tmp_path: Path, shell: dict[str, str]) -> None:
    phone = Phone(tmp_path / "root", shell)
    phone.run()
    text = rendered("run_qwen_qnn.sh.j2", program="demo", model="int8.mllm", arch="v75", limit=9)
    (phone.root / "run.sh").write_text(text)
    assert phone.run()[1][-1] != "loaded"


def test_a_context_that_nobody_vouches_for_is_removed(
    tmp_path: Path, shell: dict[str, str]
) -> None:
    phone = Phone(tmp_path / "root", shell)
    phone.context.write_text("of somebody else")
    assert phone.run()[1][-1] != "loaded"
    # Replaced behind our back.
    phone.context.write_text("another one, from elsewhere")
    assert "removed" in phone.run()[2]
    # Removed, as a deployment does: the one that is made next counts.
    phone.context.unlink()
    assert phone.run()[1][-1] != "loaded"
    assert phone.run()[1][-1] == "loaded"


def test_a_run_that_fails_leaves_no_context_that_counts(
    tmp_path: Path, shell: dict[str, str]
) -> None:
    phone = Phone(tmp_path / "root", shell)
    (phone.root / "fail").touch()
    code, _, _ = phone.run()
    assert code == 7
    assert phone.context.exists()  # cut short, perhaps
    (phone.root / "fail").unlink()
    code, called, said = phone.run()
    assert (code, called[-1] != "loaded") == (0, True)
    assert "did not end well" in said


@pytest.mark.parametrize(
    "missing", ["vocab/merges.txt", "qnn-lib/libQnnHtpV75Skel.so", "models/cpu.mllm"]
)
def test_what_is_missing_is_named(tmp_path: Path, shell: dict[str, str], missing: str) -> None:
    phone = Phone(tmp_path / "root", shell, needs=["models/cpu.mllm"])
    (phone.root / "models/cpu.mllm").touch()
    (phone.root / missing).unlink()
    code, called, said = phone.run()
    assert (code, called) == (3, [])
    assert f"{missing} is missing" in said
