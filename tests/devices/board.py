"""A board for tests: the real sshd on loopback, with keys of its own, as the user who tests."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.devices.cable import Cable
from tests.devices.packages import NoPackages, unpacked
from tests.devices.phone_namespace import library_path

SETTINGS = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile {folder}/identity.pub
LogLevel VERBOSE
"""
# Run as root, sshd wants a user and a folder of its own; these are seen by it alone, and so is
# a login shell that reads no start files.
AS_ROOT = """mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount --bind "$1" /etc/passwd &&
shift && exec "$@" """


class NoBoard(Exception):
    """No board can be had here; the text says why."""


class Board:
    """One sshd, reached through a cable. Invariant: it ends with `close`."""

    def __init__(self, folder: Path) -> None:
        try:
            self.packages = unpacked()
        except NoPackages as error:
            raise NoBoard(str(error)) from error
        for program in ("ssh", "ssh-keygen"):
            if shutil.which(program) is None:
                raise NoBoard(f"there is no {program} here")
        self.folder = folder
        self.user = getpass.getuser()
        self._make_keys()
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            port = chosen.getsockname()[1]
        self._start(port)
        self.cable = Cable(0, port)
        self.port = self.cable.port
        self.know_host((folder / "host_key.pub").read_text())

    def _make_keys(self) -> None:
        for name in ("host_key", "other_key", "identity"):
            words = ["-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(["ssh-keygen", *words], check=True)

    def know_host(self, key: str) -> None:
        """What the client knows of the host's key; "" for nothing."""
        line = f"[127.0.0.1]:{self.port} {key}" if key else ""
        (self.folder / "known_hosts").write_text(line)

    def where(self) -> dict[str, object]:
        """What the user's devices.yaml says of this board."""
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "identity": str(self.folder / "identity"),
            "known_hosts": str(self.folder / "known_hosts"),
        }

    def _start(self, port: int) -> None:
        settings = self.folder / "sshd_config"
        settings.write_text(SETTINGS.format(port=port, folder=self.folder))
        program = str(self.packages / "root/usr/sbin/sshd")
        argv = [program, "-D", "-e", "-f", str(settings)]
        if os.getuid() == 0:
            passwd = self.folder / "passwd"
            line = "sshd:x:65533:65533::/run/sshd:/usr/sbin/nologin\n"
            users = Path("/etc/passwd").read_text().splitlines(keepends=True)
            root = [f"{user.rpartition(':')[0]}:/bin/sh\n" for user in users if ":0:0:" in user]
            passwd.write_text("".join(root) + line)
            argv = ["unshare", "-m", "sh", "-c", AS_ROOT, "sh", str(passwd), *argv]
        log = (self.folder / "sshd.log").open("w")
        environment = {**os.environ, "LD_LIBRARY_PATH": library_path(self.packages)}
        self._process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line.decode(errors="replace"))
            if "Server listening on 127.0.0.1" in said[-1]:
                break
        else:
            raise NoBoard("sshd does not start: " + "".join(said)[-400:])
        # What it says from now on must not fill the pipe.
        self._drain = subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=log)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._drain.terminate()
        self._drain.wait()
