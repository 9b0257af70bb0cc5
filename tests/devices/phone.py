"""A phone for tests: Debian's adbd in namespaces of its own, with Android's shell and userland."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.devices import phone_namespace
from tests.devices.packages import NoPackages, unpacked

REPOSITORY = Path(__file__).parents[2]
UNSHARE = ("unshare", "-Urnmpf", "--kill-child")
SERIAL = phone_namespace.GOOD


class NoPhone(Exception):
    """No phone can be had here; the text says why."""


def why_no_namespaces() -> str | None:
    """Why this user may not make namespaces, or None."""
    if shutil.which("unshare") is None:
        return "there is no unshare here"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"no user namespaces: {done.stderr.strip()}"


class Phone:
    """One phone and the adb server that it is attached to. Invariant: both end with `close`."""

    def __init__(self, folder: Path) -> None:
        reason = why_no_namespaces()
        if reason:
            raise NoPhone(reason)
        try:
            self.packages = unpacked()
        except NoPackages as error:
            raise NoPhone(str(error)) from error
        self.folder = folder
        self.root = folder / "root"
        log = (folder / "namespace.log").open("w")
        # The first process of a namespace has to bury what is left behind by others.
        program = [
            "sh",
            "-c",
            '"$@"; exit $?',
            "sh",
            sys.executable,
            "-m",
            phone_namespace.__name__,
        ]
        self._process = subprocess.Popen(
            [*UNSHARE, *program, str(folder), str(self.packages)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            self.close()
            raise NoPhone((folder / "namespace.log").read_text()[-600:])

    def order(self, **words: Any) -> Any:
        """Tell the namespace something; see phone_namespace.obey."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def environment(self, adb: str | None = None) -> dict[str, str]:
        """Variables with which the program `adb` finds this phone's server."""
        return {
            "ADB": adb or str(self.client("root")),
            "ADB_SERVER_SOCKET": f"localfilesystem:{self.folder}/adb.sock",
            "HOME": str(self.folder),
        }

    def client(self, release: str = "root") -> Path:
        """A start script for an unpacked adb: "root" is version 34, "client29" version 29."""
        program = self.packages / release / "usr/lib/android-sdk/platform-tools/adb"
        script = self.folder / f"adb-{release}"
        if not script.exists():
            libraries = phone_namespace.library_path(self.packages)
            script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{program}" "$@"\n')
            script.chmod(0o755)
        return script

    def shell(self, script: str) -> str:
        """What a script prints on the phone, by adb itself rather than by what is tested."""
        done = subprocess.run(
            [str(self.client()), "-s", SERIAL, "shell", "-T", script],
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
