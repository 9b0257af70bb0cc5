"""Starts scripts on a device and believes only those whose end mark came back.

adb returns 0 when the link is lost in the middle of a command, and ssh's 255 may be its own or
the program's. So every script is followed by a random mark and the exit code; where
that is missing, the link was lost, whatever the client says.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import subprocess
import threading
from collections.abc import Callable
from typing import IO, Protocol

from buildsys.devices.errors import CommandFailed, LinkLost
from buildsys.errors import QbuildError

QUICK = 60.0  # seconds that a command which moves no data may take
LINE = 4096


class Transport(Protocol):
    """A way to a device. name: what messages call it, "adb R5CT1"."""

    name: str

    def connect(self) -> None:
        """Make sure that the device answers. Raises DeviceError with the cause and the remedy."""

    def argv(self, script: str) -> list[str]:
        """The command line that runs `script` by the device's shell, its stdin, stdout and stderr
        passed through unchanged."""

    def environment(self) -> dict[str, str] | None:
        """The environment of that command; None for our own."""

    def facts_script(self) -> str:
        """A script that prints "NAME VALUE" lines about the hardware."""

    def explain(self, said: str) -> str:
        """Why the link may have been lost, from what the client wrote on stderr."""

    def close(self) -> None:
        """Let go of what `connect` holds. Never raises."""


def quoted(text: str) -> str:
    """`text` as one word for any POSIX shell. The only way that values enter scripts."""
    if "\0" in text:
        raise ValueError("no shell can be given a NUL")
    return shlex.quote(text)


def marked(script: str, mark: str) -> str:
    """A script that prints its end mark, whatever its commands do or print."""
    return f"(\n{script}\n)\nprintf '%s:%s\\n' {mark} \"$?\""


class Started:
    """A script that runs on a device. Invariant: its client is ended by `close` at the latest.

    The client leads a process group of its own, so that Ctrl-C reaches qbuild alone and the
    device is told in order. Its stdin is a pipe that dies with us: a killed qbuild leaves no
    client that goes on sending.
    """

    def __init__(
        self, transport: Transport, script: str, hear: Callable[[bytes], None] | None = None
    ) -> None:
        """hear: is given what comes on stderr, as it comes."""
        self.transport = transport
        self._hear = hear
        self.mark = secrets.token_hex(16)
        self.process = subprocess.Popen(
            transport.argv(marked(script, self.mark)),
            env=transport.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.said = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _listen(self) -> None:
        """Keep the last of stderr; a full pipe there would stop the device."""
        assert self.process.stderr is not None
        while data := os.read(self.process.stderr.fileno(), LINE):
            self.said += data
            del self.said[:-LINE]
            if self._hear is not None:
                self._hear(data)

    def close_input(self) -> None:
        """The end of the script's input. A client that is gone already is no error here."""
        try:
            self.stdin.close()
        except BrokenPipeError:
            return

    def end(self, output: bytes) -> tuple[bytes, int]:
        """What the script printed, and its exit code, from all of its `output`.

        Raises LinkLost without the end mark.
        """
        body, found, code = output.rpartition(f"{self.mark}:".encode())
        self.process.wait()
        self._listener.join()
        if not found or not code.endswith(b"\n"):
            raise self.lost()
        return body, int(code)

    def lost(self) -> LinkLost:
        said = self.error_text()
        why = self.transport.explain(said)
        return LinkLost(
            f"{self.transport.name}: the link was lost" + (f": {why}" if why else ""),
            remedy="connect the device and run the same command again: it goes on from there",
        )

    def error_text(self) -> str:
        return bytes(self.said).decode(errors="replace").strip()

    def close(self) -> None:
        """End the client, however far it is."""
        self.close_input()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        # Before the listener: what the client left may wait for room in this pipe for ever.
        self.stdout.close()
        self._listener.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def call(
    transport: Transport, script: str, data: bytes = b"", *, timeout: float = QUICK, what: str = ""
) -> bytes:
    """Run a script with `data` as its input and return what it prints.

    what: for the message where it fails, "cannot {what}". Raises LinkLost, and CommandFailed
    for an exit code other than 0.
    """
    started = Started(transport, script)
    watch = threading.Timer(timeout, started.process.kill)
    watch.start()
    try:
        _feed(started, data)
        output, code = started.end(started.stdout.read())
    finally:
        watch.cancel()
        started.close()
    if code:
        said = started.error_text()
        message = f"{transport.name}: cannot {what or 'run a command'}: {said or f'code {code}'}"
        raise CommandFailed(message, code, said)
    return output


def _feed(started: Started, data: bytes) -> None:
    """All of these scripts read their whole input before they print much."""
    # Where the reader is gone, the end mark is missing, or the script failed early and says why.
    with contextlib.suppress(BrokenPipeError):
        started.stdin.write(data)
    started.close_input()


def guarded(action: Callable[[], object]) -> None:
    """For ways out: do what can be done, and let no device's trouble hide the first error."""
    try:
        action()
    except (QbuildError, OSError):
        return
