"""Android devices, by the `adb` program as a child process.

Which adb: the one that is given, else $ADB, else the one in PATH, else the one that the package
adbutils carries. Every call names its device with -s, so that $ANDROID_SERIAL decides nothing,
and no server that others use is ever stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from buildsys.devices.errors import DeviceError
from buildsys.errors import ToolchainMissing, UsageError

SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\[\]%-]*")
NETWORK = re.compile(r".+:[0-9]+")
PATIENCE = 30.0
PROPERTIES = ("ro.product.cpu.abilist", "ro.soc.model", "ro.product.model", "ro.board.platform")
STATES = {
    "unauthorized": "unlock it and allow USB debugging for this computer",
    "offline": "it does not answer: reconnect it, or wait until it has started",
    "recovery": "it is in recovery mode: start it normally",
    "sideload": "it is in sideload mode: start it normally",
    "bootloader": "it is in its bootloader: start it normally",
    "no permissions": "this user may not open the USB device: see "
    "https://developer.android.com/tools/device.html",
}


def find_adb(given: str | None = None) -> str:
    """The adb program. Raises ToolchainMissing."""
    wanted = given or os.environ.get("ADB")
    if wanted:
        found = shutil.which(Path(wanted).expanduser())
        if found is None:
            raise ToolchainMissing(f"there is no adb at '{wanted}'", remedy="correct --adb or $ADB")
        return str(found)
    return shutil.which("adb") or _bundled() or _missing()


def _bundled() -> str | None:
    from importlib.util import find_spec

    spec = find_spec("adbutils")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        program = Path(folder, "binaries", "adb")
        if os.access(program, os.X_OK):
            return str(program)
    return None


def _missing() -> str:
    raise ToolchainMissing(
        "there is no adb here",
        remedy="install Android's platform-tools, or `pip install adbutils`, which carries one",
    )


def parse_devices(listing: str) -> dict[str, str]:
    """Serial -> state, from what `adb devices` prints.

    >>> parse_devices("List of devices attached\\nR5CT1\\tdevice\\n\\n")
    {'R5CT1': 'device'}
    """
    devices = {}
    for line in listing.splitlines():
        serial, tab, state = line.partition("\t")
        if tab:
            known = next((name for name in STATES if state.startswith(name)), state.strip())
            devices[serial.strip()] = known
    return devices


class AdbTransport:
    """One Android device. serial: None for the only one that is attached."""

    def __init__(self, serial: str | None = None, adb: str | None = None) -> None:
        if serial is not None and not SERIAL.fullmatch(serial):
            raise UsageError(f"'{serial}' is not the serial of an adb device")
        self.adb = adb
        self.serial = serial
        self.name = f"adb {serial}" if serial else "adb"

    def connect(self) -> None:
        self.adb = find_adb(self.adb)
        devices = self._devices()
        if self.serial is None:
            self.serial = only_one(devices)
            self.name = f"adb {self.serial}"
        elif self.serial not in devices and NETWORK.fullmatch(self.serial):
            self._ask("connect", self.serial)  # its exit code says nothing; the list below does
            devices = self._devices()
        self._check_state(devices)

    def _devices(self) -> dict[str, str]:
        return parse_devices(self._ask("devices"))

    def _check_state(self, devices: dict[str, str]) -> None:
        state = devices.get(self.serial or "")
        if state == "device":
            return
        if state is None:
            others = ", ".join(devices) or "none"
            raise DeviceError(
                f"{self.name}: not attached", remedy=f"connect it; attached are: {others}"
            )
        remedy = STATES.get(state, "adb cannot run commands on it now")
        raise DeviceError(f"{self.name}: {state}", remedy=remedy)

    def _ask(self, *words: str) -> str:
        assert self.adb is not None
        try:
            done = subprocess.run(
                [self.adb, *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"`adb {words[0]}` did not end within {PATIENCE:.0f} s",
                remedy="see what `adb devices` says",
            ) from error
        text = done.stdout.decode(errors="replace")
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or text.strip()
            raise DeviceError(f"`adb {words[0]}` failed: {said}")
        return text

    def argv(self, script: str) -> list[str]:
        assert self.adb is not None
        assert self.serial is not None
        return [self.adb, "-s", self.serial, "shell", "-T", script]

    def environment(self) -> dict[str, str] | None:
        return None

    def facts_script(self) -> str:
        names = " ".join(PROPERTIES)
        return f'for each in {names}; do printf "%s %s\\n" $each "$(getprop $each)"; done'

    def explain(self, said: str) -> str:
        if "-Tt" in said or "PTY" in said:
            return "its Android is older than 7, whose adb tells no exit codes"
        return said.removeprefix("error: ").removeprefix("adb: ")

    def close(self) -> None:
        return


def only_one(devices: dict[str, str]) -> str:
    """The one device that is attached. Raises DeviceError for none and for several."""
    if len(devices) == 1:
        return next(iter(devices))
    if not devices:
        raise DeviceError(
            "no adb device is attached", remedy="connect one, with USB debugging allowed"
        )
    raise DeviceError(
        f"{len(devices)} adb devices are attached: {', '.join(devices)}",
        remedy="choose one: `serial: ...` in ~/.config/qbuild/devices.yaml",
    )
