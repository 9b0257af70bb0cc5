"""Toolchains are told by what lies on the disk: nothing is executed to find one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from buildsys.errors import RecipeError
from buildsys.toolchains.definitions import definition, folders_for, known_names
from buildsys.toolchains.finding import Found, find, find_toolchains
from buildsys.toolchains.places import site_packages

PYTHON = {"find": [{"python": "some-tool", "interpreter": "TOOL_PYTHON", "with": ["torch"]}]}


def environment_with(folder: Path, name: str, version: str) -> Path:
    """A virtual environment's layout, with a program that must never run."""
    packages = folder / "lib" / "python3.10" / "site-packages"
    (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
    (packages / f"{name}-{version}.dist-info" / "RECORD").write_text("tool.py,sha256=abc,1\n")
    (packages / "torch-2.5.0.dist-info").mkdir()
    program = folder / "bin" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ntouch $0.was-run\n")
    program.chmod(0o755)
    return program


def test_a_distribution_in_another_python_is_found_without_starting_it(tmp_path: Path) -> None:
    program = environment_with(tmp_path / "env", "some_tool", "1.2.0+x")
    found = find(PYTHON, {"TOOL_PYTHON": str(program)})
    assert isinstance(found, Found)
    assert found.fields["python"] == str(program)
    assert found.fields["version"] == "1.2.0+x"
    assert found.fingerprint["with"] == {"torch": "2.5.0"}
    assert list(program.parent.iterdir()) == [program]


def test_the_fingerprint_knows_content_and_no_path(tmp_path: Path) -> None:
    prints = []
    for name in ("a", "b"):
        program = environment_with(tmp_path / name, "some_tool", "1.0")
        found = find(PYTHON, {"TOOL_PYTHON": str(program)})
        assert isinstance(found, Found)
        prints.append(found.fingerprint)
    assert prints[0] == prints[1]
    record = tmp_path / "b/lib/python3.10/site-packages/some_tool-1.0.dist-info/RECORD"
    record.write_text("tool.py,sha256=other,1\n")
    changed = find(PYTHON, {"TOOL_PYTHON": str(program)})
    assert isinstance(changed, Found)
    assert changed.fingerprint != prints[1]


@pytest.mark.parametrize(
    ("version", "fits"), [("0.9", False), ("0.11.0.1+aries2", True), ("2.0", False)]
)
def test_only_a_fitting_version_counts(version: str, fits: bool, tmp_path: Path) -> None:
    program = environment_with(tmp_path, "some_tool", version)
    described = {**PYTHON, "versions": {"from": "0.11", "below": "2"}, "get": "Ask them."}
    found = find(described, {"TOOL_PYTHON": str(program)})
    assert isinstance(found, Found) is fits
    if not fits:
        assert found == f"some-tool {version} is there; from 0.11 and below 2 is needed. Ask them."


def test_what_is_missing_says_where_it_was_looked_for(tmp_path: Path) -> None:
    assert find(PYTHON, {}) == "some-tool is not in qbuild's own Python"
    absent = str(tmp_path / "python")
    assert find(PYTHON, {"TOOL_PYTHON": absent}) == f"$TOOL_PYTHON names no program: {absent}"


def test_a_folder_is_told_by_a_file_in_it(tmp_path: Path) -> None:
    described = {"find": [{"variable": "SDK", "file": "sdk.yaml"}]}
    assert find(described, {}) == "$SDK is not set"
    assert "there is no sdk.yaml" in str(find(described, {"SDK": str(tmp_path)}))
    (tmp_path / "sdk.yaml").write_text("version: 1")
    one = find(described, {"SDK": str(tmp_path)})
    (tmp_path / "sdk.yaml").write_text("version: 2")
    two = find(described, {"SDK": str(tmp_path)})
    assert isinstance(one, Found)
    assert isinstance(two, Found)
    assert one.fields == two.fields == {"root": str(tmp_path)}
    assert one.fingerprint != two.fingerprint


def test_this_pythons_folders_are_those_of_its_layout() -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("this is no virtual environment")
    found = [Path(folder) for folder in site_packages(sys.executable)]
    assert found
    assert all(str(folder) in sys.path for folder in found)


def test_a_projects_own_definition_wins_and_a_wrong_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "toolchains"
    own.mkdir()
    folders = folders_for(str(tmp_path / "recipes" / "r.yaml"))
    assert definition("mobilint-compiler", folders)["unlocks"] == ["mblt", "mxq"]
    (own / "mobilint-compiler.yaml").write_text("find: [{variable: X}]\n")
    assert definition("mobilint-compiler", folders) == {"find": [{"variable": "X"}]}
    (own / "mobilint-compiler.yaml").write_text("find: [{variable: X, run: rm}]\n")
    with pytest.raises(RecipeError, match=r"mobilint-compiler\.yaml: unknown key 'run'"):
        definition("mobilint-compiler", folders)
    (own / "mobilint-compiler.yaml").write_text("find: [x]\n")
    with pytest.raises(RecipeError, match="each place in `find`"):
        definition("mobilint-compiler", folders)


def test_definitions_are_remembered_by_content(tmp_path: Path) -> None:
    memory, own = tmp_path / "memory", tmp_path / "own"
    own.mkdir()
    (own / "a.yaml").write_text("find: [{variable: A}]\n")
    assert definition("a", [str(own)], str(memory)) == {"find": [{"variable": "A"}]}
    assert [file.name for file in memory.iterdir()] == ["a.yaml.json"]
    (memory / "a.yaml.json").write_text("damaged")
    assert definition("a", [str(own)], str(memory)) == {"find": [{"variable": "A"}]}
    (own / "a.yaml").write_text("find: [{variable: B}]\n")
    assert definition("a", [str(own)], str(memory)) == {"find": [{"variable": "B"}]}
    found = find_toolchains(["a", "b"], [str(own)], {"B": str(tmp_path)}, str(memory))
    assert set(found.found) == {"a"}
    assert "there is no toolchains/b.yaml" in found.missing["b"]


SDK = {
    "versions": {"from": "2.34"},
    "find": [
        {
            "variable": "SDK",
            "file": "inc/a.h",
            "names": "tools/*",
            "version": [
                {"file": "sdk.yaml", "pattern": r"^version:\s*([0-9.]+)"},
                {"folder": r"([0-9]+(?:\.[0-9]+)+)$"},
            ],
        }
    ],
}


def sdk(folder: Path, yaml: str | None = None) -> dict[str, str]:
    (folder / "inc").mkdir(parents=True)
    (folder / "inc" / "a.h").write_text("#pragma once\n")
    (folder / "tools" / "8.7.06").mkdir(parents=True)
    if yaml is not None:
        (folder / "sdk.yaml").write_text(yaml)
    return {"SDK": str(folder)}


def test_a_version_is_told_by_a_file_or_else_by_the_folders_name(tmp_path: Path) -> None:
    for environment in (
        sdk(tmp_path / "anywhere", "name: x\nversion: 2.40.1.25\n"),
        sdk(tmp_path / "sdk-2.40.1.25"),
    ):
        found = find(SDK, environment)
        assert isinstance(found, Found)
        assert found.fields["version"] == "2.40.1.25"
    old = find(SDK, sdk(tmp_path / "old", "version: 2.33.9"))
    assert old == f"$SDK is {tmp_path}/old, of version 2.33.9; from 2.34 is needed"
    untold = find(SDK, sdk(tmp_path / "untold"))
    assert "its version is not told by sdk.yaml or the folder's name" in str(untold)


def test_tools_inside_an_sdk_are_part_of_its_fingerprint(tmp_path: Path) -> None:
    environment = sdk(tmp_path / "sdk-2.40.1")
    one = find(SDK, environment)
    (tmp_path / "sdk-2.40.1" / "tools" / "19.0.04").mkdir()
    two = find(SDK, environment)
    assert isinstance(one, Found)
    assert isinstance(two, Found)
    assert one.fingerprint["names"] == ["8.7.06"]
    assert two.fingerprint["names"] == ["19.0.04", "8.7.06"]


def test_a_program_is_told_by_its_name_and_its_beginning(tmp_path: Path) -> None:
    described = {"find": [{"program": ["cc-22", "cc-19"]}]}
    assert find(described, {"PATH": str(tmp_path)}) == "none of cc-22, cc-19 is on PATH"
    program = tmp_path / "cc-19"
    program.write_text("#!/bin/sh\ntouch $0.was-run\n")
    program.chmod(0o755)
    one = find(described, {"PATH": f":/nowhere:{tmp_path}"})
    assert isinstance(one, Found)
    assert one.fields == {"program": str(program), "version": "19", "root": str(tmp_path)}
    program.write_text("#!/bin/sh\ntouch $0.was-run\n\n")
    assert find(described, {"PATH": str(tmp_path)}) != one
    assert list(tmp_path.iterdir()) == [program]


def test_several_toolchains_together_are_all_there_or_missing(tmp_path: Path) -> None:
    own = tmp_path / "toolchains"
    own.mkdir()
    (own / "a.yaml").write_text("find: [{variable: A}]\n")
    (own / "b.yaml").write_text("find: [{variable: B}]\nget: Buy it.\n")
    environment = {"A": str(tmp_path)}
    lacking = find_toolchains(["a+b"], [str(own)], environment)
    assert lacking.missing["a+b"] == "b: $B is not set. Buy it."
    together = find_toolchains(["a+b"], [str(own)], {**environment, "B": str(own)}).found["a+b"]
    assert together.fields == {
        "root": str(tmp_path),
        "a.root": str(tmp_path),
        "b.root": str(own),
    }
    assert set(together.fingerprint) == {"a", "b"}


def test_the_shipped_definitions_are_right_and_say_how_to_get_them() -> None:
    folders = folders_for("recipes/recipe.yaml")
    for name in known_names(folders):
        assert definition(name, folders)["doc"], name
    for name in ("qnn-sdk", "hexagon-sdk", "android-ndk", "onnxruntime-qnn", "hexagon-llvm"):
        described = definition(name, folders)
        assert described["unlocks"], name
        assert described["get"], name


@pytest.mark.parametrize(
    "install", ["{}", "{requirements: [a], installer: b}", "{requirements: [a], pin: b}", "yes"]
)
def test_a_wrong_install_section_is_named(install: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"find: [{{variable: A}}]\ninstall: {install}\n")
    with pytest.raises(RecipeError, match=r"a\.yaml: (`install` has|unknown key 'pin')"):
        definition("a", [str(tmp_path)])
