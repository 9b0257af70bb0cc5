"""Linux boards, by the `ssh` program as a child process.

Host keys are checked strictly: an unknown or a changed one is an error, never a question. One
connection is opened first (so that its failure has one place) and all commands share it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from buildsys.devices.errors import DeviceError
from buildsys.devices.transport import quoted
from buildsys.errors import ToolchainMissing, UsageError

HOST = re.compile(r"[A-Za-z0-9:\[][A-Za-z0-9._:%\[\]-]*")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
PATIENCE = 30.0
# The shared connection ends itself this long after the last command of a qbuild that was killed.
LINGER = 10
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "LogLevel": "ERROR",
}
REMEDIES = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key has changed: if you know why, remove "
    "the old one with `ssh-keygen -R HOST` and log in once with ssh",
    "Host key verification failed": "its host key is not known: log in once with ssh, and compare",
    "Permission denied": "it takes none of your keys: see that `ssh -o BatchMode=yes HOST` works",
}


class Address(NamedTuple):
    """Where a board is. port, user, identity, known_hosts: None for what ssh's settings say."""

    host: str
    user: str | None = None
    port: int | None = None
    identity: str | None = None
    known_hosts: str | None = None

    def checked(self) -> Address:
        """Raises UsageError for what ssh could read as an option."""
        if not HOST.fullmatch(self.host):
            raise UsageError(f"'{self.host}' is not the name of a host")
        if self.user is not None and not USER.fullmatch(self.user):
            raise UsageError(f"'{self.user}' is not the name of a user")
        return self


class SshTransport:
    """One board. Invariant: between `connect` and `close` a connection is open for all."""

    def __init__(self, address: Address) -> None:
        self.address = address.checked()
        self.name = f"ssh {address.host}"
        self.folder: str | None = None

    def connect(self) -> None:
        if shutil.which("ssh") is None:
            raise ToolchainMissing("there is no ssh here", remedy="install OpenSSH's client")
        self.folder = tempfile.mkdtemp(prefix="qbuild-ssh-")
        argv = self._ssh("-M", "-N", "-f", "-o", f"ControlPersist={LINGER}")
        log_path = Path(self.folder, "log")
        # What goes to the background keeps its stderr: a pipe there would never end.
        with log_path.open("wb") as log:
            try:
                done = subprocess.run(
                    [*argv, "--", self.address.host],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    timeout=PATIENCE,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                message = f"{self.name}: did not answer within {PATIENCE:.0f} s"
                raise DeviceError(message, remedy="see that it is on and reachable") from error
        if done.returncode:
            self._refuse(log_path.read_text(errors="replace").strip())

    def _refuse(self, said: str) -> None:
        remedy = next((text for sign, text in REMEDIES.items() if sign in said), None)
        last = said.splitlines()[-1] if said else "ssh failed and did not say why"
        raise DeviceError(
            f"{self.name}: {last}",
            remedy=remedy.replace("HOST", self.address.host) if remedy else None,
        )

    def _ssh(self, *words: str) -> list[str]:
        argv = ["ssh", "-T"]
        for name, value in OPTIONS.items():
            argv += ["-o", f"{name}={value}"]
        where = self.address
        if where.user:
            argv += ["-l", where.user]
        if where.port:
            argv += ["-p", str(where.port)]
        if where.identity:
            argv += ["-i", str(Path(where.identity).expanduser()), "-o", "IdentitiesOnly=yes"]
        if where.known_hosts:
            argv += ["-o", f"UserKnownHostsFile={Path(where.known_hosts).expanduser()}"]
        return [*argv, "-S", f"{self.folder}/connection", *words]

    def argv(self, script: str) -> list[str]:
        # The login shell may be any: it only has to start sh. Without the shared connection the
        # command fails, rather than making one of its own.
        command = f"exec sh -c {quoted(script)}"
        return [*self._ssh("-o", "ControlMaster=no"), "--", self.address.host, command]

    def environment(self) -> dict[str, str] | None:
        return None

    def facts_script(self) -> str:
        return (
            "command -v bm-smi >/dev/null 2>&1 && "
            "bm-smi --start_dev=0 --last_dev=0 --text_format 2>/dev/null | "
            "sed -n 's/.*\\(BM16[0-9A-Za-z]*\\|CV186[A-Za-z]*\\).*/chip \\1/p' | head -n 1"
        )

    def explain(self, said: str) -> str:
        return said

    def close(self) -> None:
        if self.folder is None:
            return
        if Path(self.folder, "connection").exists():
            subprocess.run(
                [*self._ssh("-O", "exit"), "--", self.address.host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = None
