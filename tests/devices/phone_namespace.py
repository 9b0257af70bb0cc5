"""What runs inside a phone's namespaces: adbd in its root, an adb server, and the cable between.

Started by phone.py as `unshare -Urnmpf --kill-child python -m ... FOLDER PACKAGES`.
Nothing here is reachable from outside but the server's UNIX socket. The cable is a TCP proxy that
can be cut after a number of bytes. Commands are read from stdin, one JSON line each, and answered
with one line; the end of stdin ends everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tests.devices.cable import Cable

# Ports 5555 to 5585 are scanned by every server as those of emulators.
ADBD, CABLE = 16601, 16602
UNAUTHORIZED, SILENT, OLD = 16603, 16604, 16605
GOOD = f"127.0.0.1:{CABLE}"
APPLETS = """
    awk base64 cat chmod cksum cmp cp cut date dd df dirname echo env expr fallocate false
    find flock fsync  grep head hostname id kill ln ls md5sum mkdir mktemp mv nproc od printf
    ps pwd readlink realpath rm  rmdir sed seq setsid sha256sum sleep sort stat sync tail tee
    test timeout touch tr true  truncate uname uniq uptime wc which whoami xargs
"""
PROPERTIES = {
    "ro.product.cpu.abilist": "x86_64,arm64-v8a",
    "ro.product.model": "Stand-in",
    "ro.soc.model": "SM8650",
    "ro.soc.manufacturer": "QTI",
    "ro.build.version.sdk": "34",
}


def main() -> None:
    folder, packages = Path(sys.argv[1]), Path(sys.argv[2])
    raise_loopback()
    root = make_root(folder / "root", packages)
    cable = Cable(CABLE, ADBD)
    for port, talk in ((UNAUTHORIZED, demand_key), (SILENT, say_nothing)):
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=pretend, args=(listener, talk), daemon=True).start()
    phone = Phone(folder, packages, root)
    phone.plug_in()
    print("ready", flush=True)
    for line in sys.stdin:
        answer = obey(json.loads(line), cable, phone)
        print(json.dumps(answer), flush=True)


def obey(order: dict[str, object], cable: Cable, phone: Phone) -> object:
    """One command of the test's."""
    match order:
        case {"cut_after": int(count)}:
            cable.cut_after(count)
        case {"hold_after": int(count)}:
            cable.hold_after(count)
        case {"wait_until_held": _}:
            cable.wait_until_held()
        case {"cut": _}:
            cable.cut()
        case {"mend": _}:
            cable.mend()
            phone.connect(GOOD)
        case {"connect": str(port)}:
            return phone.connect(f"127.0.0.1:{port}")
        case {"forget": str(port)}:
            phone.adb("disconnect", f"127.0.0.1:{port}")
        case {"disk": int(size), "at": str(path)}:
            phone.limit(path, size)
        case {"properties": dict(values)}:
            phone.write_properties({**PROPERTIES, **values})
        case _:
            raise ValueError(order)
    return "done"


def raise_loopback() -> None:
    """`ip link set lo up`, without iproute2."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        fcntl.ioctl(device, 0x8914, struct.pack("16sh14s", b"lo", 0x1 | 0x40, b""))


def make_root(root: Path, packages: Path) -> Path:
    """A phone's root: Android's shell and userland, and the programs' libraries."""
    root.mkdir()
    run("mount", "--bind", str(root), str(root))
    programs = {"system/bin/sh": "bin/mksh", "system/bin/toybox": "bin/toybox"}
    programs["system/bin/adbd"] = "usr/lib/android-sdk/platform-tools/adbd"
    for folder in ("dev/pts", "proc", "tmp", "data/local/tmp", "system/bin", "usr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for target, source in programs.items():
        shutil.copy2(packages / "root" / source, root / target)
        copy_libraries(packages / "root" / source, root, packages)
    for name in APPLETS.split():
        (root / "system/bin" / name).symlink_to("toybox")
    getprop = root / "system/bin/getprop"
    getprop.write_text('#!/system/bin/sh\nsed -n "s/^$1=//p" /system/build.prop\n')
    getprop.chmod(0o755)
    (root / "bin").symlink_to("system/bin")
    for device in ("null", "zero", "urandom", "tty", "full"):
        (root / "dev" / device).touch()
        run("mount", "--bind", f"/dev/{device}", str(root / "dev" / device))
    run("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", f"{root}/dev/pts")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    run("mount", "-t", "proc", "proc", f"{root}/proc")
    return root


def copy_libraries(program: Path, root: Path, packages: Path) -> None:
    """Everything that the loader would load, under the name it is asked for by."""
    listed = subprocess.run(
        ["ldd", str(program)],
        env={**os.environ, "LD_LIBRARY_PATH": library_path(packages)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in listed.splitlines():
        words = line.split()
        path = next((word for word in words if word.startswith("/")), None)
        if path is None:
            continue
        target = root / (path.lstrip("/") if "ld-linux" in path else f"lib/{Path(path).name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def library_path(packages: Path) -> str:
    folders = (
        "usr/lib/x86_64-linux-gnu/android",
        "usr/lib/x86_64-linux-gnu",
        "lib/x86_64-linux-gnu",
    )
    return ":".join(str(packages / "root" / each) for each in folders)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=sys.stderr)


class Phone:
    """adbd in its root, and the server that knows it."""

    def __init__(self, folder: Path, packages: Path, root: Path) -> None:
        self.root = root
        self.socket = f"localfilesystem:{folder}/adb.sock"
        self.client = str(packages / "root/usr/lib/android-sdk/platform-tools/adb")
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LD_LIBRARY_PATH": library_path(packages),
            "ADB_SERVER_SOCKET": self.socket,
            "ADB_MDNS": "0",
        }
        self.write_properties(PROPERTIES)

    def plug_in(self) -> None:
        """Start adbd, the server, and let one find the other."""
        root = str(self.root)
        own = {"ADBD_PORT": str(ADBD), "SHELL": "/system/bin/sh", "PATH": "/system/bin"}
        own |= {"HOME": "/", "TMPDIR": "/data/local/tmp"}
        log = (self.root.parent / "adbd.log").open("w")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        chroot = shutil.which("chroot", path=f"{os.environ['PATH']}:/usr/sbin") or "chroot"
        subprocess.Popen([chroot, root, "/system/bin/adbd"], env=own, **quiet)
        listening(ADBD)
        server = (self.root.parent / "server.log").open("w")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": server, "stderr": server}
        subprocess.Popen([self.client, "server", "nodaemon"], env=self.environment, **quiet)
        self.wait_for_server()
        self.connect(GOOD)

    def wait_for_server(self) -> None:
        path = self.socket.partition(":")[2]
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(path) == 0:
                    return
            select.select([], [], [], 0.02)

    def connect(self, address: str) -> str:
        """Connect, and wait until the server can say what became of it."""
        self.adb("disconnect", address)
        said = self.adb("connect", address)
        if address == GOOD:
            self.adb("-s", address, "wait-for-device")
        return said

    def adb(self, *words: str) -> str:
        done = subprocess.run(
            [self.client, *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout + done.stderr

    def limit(self, path: str, size: int) -> None:
        """A disk of `size` bytes at `path`."""
        folder = self.root / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    def write_properties(self, values: dict[str, str]) -> None:
        lines = [f"{name}={value}\n" for name, value in values.items()]
        (self.root / "system/build.prop").write_text("".join(lines))


def listening(port: int) -> None:
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        select.select([], [], [], 0.02)


def pretend(listener: socket.socket, talk: Callable[[socket.socket], None]) -> None:
    """A device that gets no further than its greeting."""
    kept = []
    while True:
        host, _ = listener.accept()
        kept.append(host)
        threading.Thread(target=talk, args=(host,), daemon=True).start()


def demand_key(host: socket.socket) -> None:
    """Ask for a signature, and again after each one: nobody has tapped "Allow"."""
    while True:
        header = host.recv(24, socket.MSG_WAITALL)
        if len(header) < 24:
            return
        length = struct.unpack("<6I", header)[3]
        host.recv(length, socket.MSG_WAITALL)
        command = int.from_bytes(b"AUTH", "little")
        token = bytes(range(20))
        head = (command, 1, 0, len(token), sum(token), command ^ 0xFFFFFFFF)
        if header[:4] == b"AUTH" and header[4] == 3:
            continue  # the public key: the phone now shows its question
        host.sendall(struct.pack("<6I", *head) + token)


def say_nothing(host: socket.socket) -> None:
    """Take everything and answer nothing, like a phone that is still starting."""
    while host.recv(1 << 16):
        pass


if __name__ == "__main__":
    main()
