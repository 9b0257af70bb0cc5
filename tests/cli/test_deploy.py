"""`qbuild deploy`, typed as a user types it: builds what is stale, checks, sends, runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from buildsys.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
qbuild: 1
name: app
vars: {word: one, device_root: "%s"}
sources: {src: {file: in.txt}, tool: {file: tool.sh}}
artifacts:
  model.bin: {rule: command, inputs: {src: src}, options: {argv: [cp, "${in.src}", "${out}"]}}
  figures.json:
    rule: command
    inputs: {src: src}
    options: {argv: [sh, -c, 'echo "{\\"loss\\": 1}" > "$0"', "${out}"]}
  "lib/${i}/libOp.txt":
    matrix: {i: [cpu, htp]}
    rule: command
    inputs: {model: model.bin}
    options: {argv: [cp, "${in.model}", "${out}"]}
gates: {figures.json: {loss: 2}}
devices:
  near:
    transport: local
    root: "${device_root}/near"
    push:
      model.bin: models/
      lib/cpu/libOp.txt: libOp_CPU.txt
      lib/htp/libOp.txt: libOp_HTP.txt
      tool: {to: run-me, mode: "755"}
    invalidates: {cache.bin: [model.bin]}
    run: {argv: ["${device.root}/run-me", first], timeout: 20s}
    pull: {result.txt: result.txt}
  far:
    transport: local
    root: "${device_root}/far"
    push: {model.bin: .}
"""
TOOL = """#!/bin/sh
for each in "$@"; do printf '<%s>' "$each"; done
echo done > result.txt
[ "$2" != fail ] || exit 7
[ "$2" != stay ] || { echo here; sleep 1000 & wait; }
"""


class Project:
    """A project of a user's, with devices that are folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.there = folder / "devices"
        self.home = folder / "home"
        (self.folder / "recipes").mkdir(parents=True)
        self.write(RECIPE % self.there)
        (self.folder / "recipes/in.txt").write_text("hello")
        (self.folder / "recipes/tool.sh").write_text(TOOL)

    def write(self, recipe: str) -> None:
        (self.folder / "recipes/app.yaml").write_text(recipe)

    def devices_yaml(self, text: str) -> None:
        path = self.home / "qbuild/devices.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(self.home)}
        return subprocess.Popen(
            [sys.executable, "-m", "buildsys", "deploy", *words],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def deploy(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def content(self, device: str = "near") -> dict[str, str]:
        root = self.there / device
        return {
            str(path.relative_to(root)): path.read_text()
            for path in root.rglob("*")
            if path.is_file() and ".qb" not in path.parts
        }


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_it_builds_sends_runs_and_brings_back(project: Project) -> None:
    done = project.deploy("--device", "near", "--run", "--", "it's", "$(id)", "-x", "a.yaml")
    assert done.stdout.endswith("<first><it's><$(id)><-x><a.yaml>")
    deployed = project.content()
    assert deployed.pop("result.txt") == "done\n"
    assert deployed == {
        "models/model.bin": "hello", "libOp_CPU.txt": "hello", "libOp_HTP.txt": "hello",
        "run-me": TOOL,
    }  # fmt: skip
    assert os.access(project.there / "near/run-me", os.X_OK)
    result = project.folder / "build/app/devices/near/result.txt"
    assert result.read_text() == "done\n"


def test_what_is_defined_holds_for_a_build_folder_that_is_not_there_yet(
    project: Project, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    project.deploy("--device", "far", "-D", f"device_root={elsewhere}", "-D", "word=two")
    assert (elsewhere / "far/model.bin").read_text() == "hello"
    # The same again, and without: the folder knows now.
    project.deploy("--device", "far")
    assert not (project.there / "far").exists()


def test_a_second_deploy_sends_nothing_and_a_changed_source_is_built_and_sent(
    project: Project,
) -> None:
    project.deploy("--device", "near")
    again = project.deploy("--device", "near")
    assert "nothing had to be sent" in again.stderr
    (project.folder / "recipes/in.txt").write_text("other")
    (project.there / "near/cache.bin").write_text("stale")
    project.deploy("--device", "near")
    deployed = project.content()
    assert deployed["models/model.bin"] == deployed["libOp_HTP.txt"] == "other"
    assert "cache.bin" not in deployed


def test_the_programs_exit_code_is_the_commands(project: Project) -> None:
    project.deploy("--device", "near", "--run", "--", "fail", code=7)


def test_without_a_name_it_asks_which(project: Project) -> None:
    for words in ((), ("--device",), ("--device", "recipes/app.yaml")):
        done = project.deploy(*words, code=2)
        assert "which device? there are near, far" in done.stderr
    done = project.deploy("--device", "naer", code=2)
    assert "did you mean 'near'?" in done.stderr


def test_several_devices_and_the_worst_exit_code(project: Project) -> None:
    done = project.deploy("recipes/app.yaml", "--device", "all")
    lines = done.stderr.splitlines()
    assert any(line.startswith("near  ") for line in lines)
    assert any(line.startswith("far   ") for line in lines)
    assert project.content("far") == {"model.bin": "hello"}
    done = project.deploy("--device", "near", "--device", "far", "--run", code=3)
    assert "the device 'far' has nothing to run" in done.stderr
    assert "<first>" in done.stdout


def test_events_are_lines_of_json(project: Project) -> None:
    done = project.deploy("--device", "near", "--run", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["device"] for event in events} == {"near"}
    kinds = [event["event"] for event in events]
    assert [kinds.index(kind) for kind in ("sending", "sent", "deployed", "running", "ended")] == (
        sorted(kinds.index(kind) for kind in ("sending", "sent", "deployed", "running", "ended"))
    )
    output = "".join(event["text"] for event in events if event["event"] == "output")
    assert output == "<first>"


def test_gates_of_an_optional_artifact_count_where_it_was_made(project: Project) -> None:
    """Where its toolchain is missing it is skipped, and blocks nothing that does not need it."""
    inputs = "    inputs: {src: src}\n    options: {argv: [sh"
    optional = (RECIPE % project.there).replace(inputs, f"    optional: true\n{inputs}")
    assert optional.count("optional: true") == 1
    project.write(optional.replace("{loss: 2}", "{loss: 0.5}"))
    project.deploy("--device", "far")
    assert project.content("far") == {"model.bin": "hello"}
    project.write(RECIPE % project.there)
    project.deploy("--device", "far")  # makes the figures
    project.write(optional.replace("{loss: 2}", "{loss: 0.5}"))
    done = project.deploy("--device", "far", code=2)
    assert "gate fails: figures.json loss = 1 > 0.5" in done.stderr


def test_dry_run_writes_nothing_there(project: Project) -> None:
    project.deploy("--device", "far")
    done = project.deploy("--device", "near", "--dry-run", "--no-build", code=2)
    assert "is not built" in done.stderr
    assert not (project.there / "near").exists()


def test_no_build_says_what_is_stale(project: Project) -> None:
    project.deploy("--device", "far")
    (project.folder / "recipes/in.txt").write_text("other")
    done = project.deploy("--device", "far", "--no-build")
    assert "warning: model.bin is stale" in done.stderr
    assert project.content("far") == {"model.bin": "hello"}


def test_a_gate_that_fails_blocks(project: Project) -> None:
    project.write((RECIPE % project.there).replace("{loss: 2}", "{loss: 0.5}"))
    done = project.deploy("--device", "near", code=1)
    assert "gate fails: figures.json loss = 1 > 0.5" in done.stderr
    assert not (project.there / "near").exists()
    done = project.deploy("--device", "near", "--no-build", code=2)
    assert "gate fails" in done.stderr


def test_an_artifact_that_does_not_exist_is_shown_in_the_recipe(project: Project) -> None:
    project.write((RECIPE % project.there).replace("push: {model.bin: .}", "push: {modle.bin: .}"))
    done = project.deploy("--device", "far", code=2)
    line = next(i for i, text in enumerate(RECIPE.splitlines(), 1) if "push: {model" in text)
    assert f"app.yaml:{line}:" in done.stderr
    assert "did you mean 'model.bin'?" in done.stderr


@pytest.mark.parametrize("where", ["/", "/data/local/tmp/..", "/etc/q", "~", "."])
def test_a_dangerous_root_is_refused(project: Project, where: str) -> None:
    text = (RECIPE % project.there).replace('root: "${device_root}/far"', f'root: "{where}"')
    project.write(text)
    done = project.deploy("--device", "far", code=2)
    assert "the root" in done.stderr


@pytest.mark.parametrize(
    "name", ["../../.ssh/authorized_keys", "/etc/passwd", "a b", "$(id)", "-rf", ".qb/x", "a;b"]
)
def test_names_that_could_mean_something_are_refused(project: Project, name: str) -> None:
    project.write((RECIPE % project.there).replace("{model.bin: .}", f'{{model.bin: "{name}"}}'))
    done = project.deploy("--device", "far", code=2)
    assert "cannot be a name on a device" in done.stderr
    assert not project.there.exists()


def test_two_files_with_one_name_are_refused(project: Project) -> None:
    """The two op packages of one basename: one would silently replace the other."""
    text = RECIPE % project.there
    project.write(text.replace("libOp_HTP.txt", ".").replace("libOp_CPU.txt", "."))
    done = project.deploy("--device", "near", code=2)
    assert "would both be libOp.txt" in done.stderr
    project.write(text.replace("libOp_HTP.txt", "libop_cpu.TXT"))
    done = project.deploy("--device", "near", code=2)
    assert "where case does not count" in done.stderr


def test_the_users_file_says_where(project: Project) -> None:
    project.devices_yaml(
        f"devices:\n  far: {{root: {project.there}/elsewhere}}\n"
        f"  second: {{like: far, root: {project.there}/second}}\n"
        f"  own: {{transport: local, root: {project.there}/own, push: {{model.bin: m/}}}}\n"
    )
    project.deploy("--device", "far", "--device", "second", "--device", "own")
    assert project.content("elsewhere") == project.content("second") == {"model.bin": "hello"}
    assert project.content("own") == {"m/model.bin": "hello"}
    assert not (project.there / "far").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: {far: {push: {model.bin: x}}}", "is the recipe's to say"),
        ("devices: {new: {root: /data/q}}", "'transport' is missing"),
        ("devices: {new: {like: phone, serial: X}}", "the recipe has no device 'phone'"),
        ("devices: {far: {sreial: X}}", "did you mean 'serial'?"),
        ("devices: {far: {port: 0}}", "at least 1"),
        ("devices: !!python/object/apply:os.system [id]", "YAML tags"),
    ],
)
def test_mistakes_in_the_users_file_have_a_place(project: Project, text: str, message: str) -> None:
    project.devices_yaml(text)
    done = project.deploy("--device", "far", code=2)
    assert message in done.stderr
    assert "devices.yaml:1:" in done.stderr


def test_a_recipe_cannot_name_a_serial(project: Project) -> None:
    """Serials and hosts are of one person's desk."""
    text = (RECIPE % project.there).replace("    push: {model.bin: .}", "    serial: R5CT1")
    project.write(text)
    assert "unknown key 'serial'" in project.deploy("--device", "far", code=2).stderr


def test_a_toolchains_file_is_pushed(project: Project) -> None:
    kit = project.folder / "kit"
    (kit / "lib").mkdir(parents=True)
    (kit / "lib/libA.txt").write_text("a")
    (kit / "lib/libB.txt").write_text("b")
    project.write((RECIPE % project.there).replace("{model.bin: .}", '{"toolchain:kit/lib/*": l/}'))
    done = project.deploy("--device", "far", code=3)
    assert "where is the toolchain 'kit'?" in done.stderr
    project.devices_yaml(f"devices: {{}}\ntoolchains: {{kit: {kit}}}\n")
    project.deploy("--device", "far")
    assert project.content("far") == {"l/libA.txt": "a", "l/libB.txt": "b"}


def test_ctrl_c_ends_the_program_there(project: Project) -> None:
    process = project.start("--device", "near", "--run", "--", "stay")
    assert process.stdout is not None
    line = ""
    while "here" not in line:
        line = process.stdout.readline()
        assert line
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    programs = [command_line(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [each for each in programs if f"{project.there}/near/run-me".encode() in each]
    assert (project.there / "near/.qb/running").exists()


def command_line(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has ended meanwhile


def test_disk_here_that_takes_no_run_script_is_an_error_that_says_so(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.deploy("recipes/app.yaml", "--device", "near")
    monkeypatch.chdir(project.folder)
    # What `tempfile` raises where every disk is full is of this kind, too.
    monkeypatch.setattr(tempfile, "tempdir", str(project.folder / "no-such-folder"))
    assert main(["deploy", "--device", "near", "--no-build"]) == 3
    said = capsys.readouterr().err
    assert "the run script cannot be written on this machine: No such file or directory" in said
    assert "TMPDIR" in said
