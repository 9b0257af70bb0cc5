"""What `qbuild toolchain install` puts below the cache is whole, or does not count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from buildsys.errors import UsageError
from buildsys.toolchains.finding import Found, find
from buildsys.toolchains.installed import folder_for, installed_folder
from buildsys.toolchains.installing import InstallFailed, install
from tests.toolchains.registry import environment_for, make_wheel

DESCRIBED = {
    "find": [{"python": "sometool", "installed": True}],
    "install": {"requirements": ["sometool==1.0"], "imports": ["sometool"]},
}
INSTALL = """
import json, os, sys
from buildsys.toolchains.installing import install
install("tool", json.loads(sys.argv[1]), os.environ, lambda text: print(text, flush=True))
"""


def start(described: object, environment: dict[str, str]) -> subprocess.Popen[str]:
    """An installation in a process of its own, and group, that can be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", INSTALL, json.dumps(described)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    make_wheel(tmp_path / "wheels", "sometool", "1.0")
    return environment_for(tmp_path / "wheels", tmp_path / "cache")


def test_an_installed_toolchain_is_found_and_works(environment: dict[str, str]) -> None:
    assert find(DESCRIBED, environment, "tool") == "it is not installed"
    said: list[str] = []
    folder = install("tool", DESCRIBED, environment, said.append)
    assert folder.startswith(environment["QBUILD_CACHE"])
    found = find(DESCRIBED, environment, "tool")
    assert isinstance(found, Found)
    assert found.fields["version"] == "1.0"
    printed = subprocess.run(
        [found.fields["python"], "-c", "import sometool; sometool.main()"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == "1.0\n"
    # Once more: there is nothing to do, and nothing is done.
    said.clear()
    assert install("tool", DESCRIBED, environment, said.append) == folder
    assert said == []


def test_the_fingerprint_does_not_depend_on_where_it_was_installed(
    environment: dict[str, str], tmp_path: Path
) -> None:
    prints = []
    for name in ("one", "two"):
        environment["QBUILD_CACHE"] = str(tmp_path / name)
        install("tool", DESCRIBED, environment, lambda text: None)
        found = find(DESCRIBED, environment, "tool")
        assert isinstance(found, Found)
        prints.append(found.fingerprint)
        record = Path(found.fields["root"]) / "sometool-1.0.dist-info" / "RECORD"
        assert record.read_text().startswith("../")  # its script, which names its own Python
    assert prints[0] == prints[1]
    assert prints[0]["files"] is not None


def test_a_killed_installation_does_not_count_and_the_next_one_is_whole(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Killed after pip has put the package there: it looks whole, and its mark is missing."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    wheel = "open({0!r}, 'w').write('x'); open({0!r}).read()\n".format(str(fifo))
    make_wheel(tmp_path / "wheels", "sometool", "1.0", wheel)
    process = start(DESCRIBED, environment)
    assert fifo.read_text() == "x"  # the package is being imported
    folder = folder_for("tool", DESCRIBED, environment)
    assert folder is not None
    assert Path(folder, "bin/python").exists()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert installed_folder("tool", DESCRIBED, environment) is None
    # Its program is alive and holds the lock: the next one waits for it.
    make_wheel(tmp_path / "wheels", "sometool", "1.0")
    waiting, done = threading.Event(), []

    def say(text: str) -> None:
        if "waiting" in text:
            waiting.set()

    thread = threading.Thread(
        target=lambda: done.append(install("tool", DESCRIBED, environment, say))
    )
    thread.start()
    assert waiting.wait(60)
    assert not done
    fifo.write_text("go on")
    thread.join(120)
    assert done == [folder]
    assert installed_folder("tool", DESCRIBED, environment) == folder


def test_two_at_once_install_it_once(environment: dict[str, str]) -> None:
    both = [start(DESCRIBED, environment) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("installing" in text for text in said) == 1
    assert installed_folder("tool", DESCRIBED, environment) is not None


def test_what_pip_refuses_is_said_and_mended_by_running_it_again(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    described = {**DESCRIBED, "install": {"requirements": ["othertool==1.0"]}}
    with pytest.raises(InstallFailed, match="No matching distribution found for othertool") as told:
        install("tool", described, environment, lambda text: None)
    assert "run the same again" in str(told.value)
    assert installed_folder("tool", described, environment) is None
    make_wheel(tmp_path / "wheels", "othertool", "1.0")
    folder = install("tool", described, environment, lambda text: None)
    assert installed_folder("tool", described, environment) == folder


def test_another_pin_is_another_folder(environment: dict[str, str]) -> None:
    other = {**DESCRIBED, "install": {"requirements": ["sometool==1.1"]}}
    one, two = (folder_for("tool", each, environment) for each in (DESCRIBED, other))
    assert one != two


def test_without_a_way_or_a_place_to_install_it_says_so(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"cannot install sdk\nAsk the vendor"):
        install("sdk", {"find": [], "get": "Ask the vendor."}, environment, lambda text: None)
    environment["QBUILD_CACHE"] = ""
    with pytest.raises(UsageError, match="QBUILD_CACHE is empty"):
        install("tool", DESCRIBED, environment, lambda text: None)


def test_a_python_that_does_not_fit_is_replaced_by_one_on_path(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    install_section = {"requirements": ["sometool==1.0"], "python": {"from": "4.0"}}
    described = {**DESCRIBED, "install": install_section}
    environment["PATH"] = str(tmp_path)
    with pytest.raises(InstallFailed, match=r"needs a Python from 4\.0, and none is on PATH"):
        install("tool", described, environment, lambda text: None)
    described["install"] = {**install_section, "python": {"below": "3.0"}}
    said: list[str] = []
    (tmp_path / "python3.1").symlink_to(sys.executable)
    described["install"] = {**install_section, "python": {"from": "3.1", "below": "3.2"}}
    with pytest.raises(InstallFailed):
        # It is chosen by its name; that it is another version shows at the latest here.
        install("tool", described, {**environment, "PIP_FIND_LINKS": ""}, said.append)
    assert said[0] == f"making an environment with {tmp_path / 'python3.1'}"


def test_an_installer_of_its_own_gets_the_folder_and_may_go_on_where_it_was(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    def special(destination: Path, job: object) -> None:
        destination.mkdir(exist_ok=True)
        if not (destination / "half").exists():
            (destination / "half").touch()
            raise InstallFailed("interrupted")
        (destination / "tool").write_text("whole")

    module = types.ModuleType("special_installer")
    module.install = special  # type: ignore[attr-defined]  # what an installer's module has
    monkeypatch.setitem(sys.modules, "special_installer", module)
    described = {
        "find": [{"installed": True, "file": "tool"}],
        "install": {"installer": "special_installer", "options": {"release": 3}},
    }
    with pytest.raises(InstallFailed, match="interrupted"):
        install("tool", described, environment, lambda text: None)
    assert find(described, environment, "tool") == "it is not installed"
    folder = install("tool", described, environment, lambda text: None)
    found = find(described, environment, "tool")
    assert isinstance(found, Found)
    assert found.fields == {"root": folder}
