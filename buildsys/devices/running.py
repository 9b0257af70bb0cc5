"""Runs a program on a device: in its folder, with its environment, and never beyond its time.

The program runs in a session of its own, and a shell beside it watches the pipe from here. When
that pipe ends - time is up, Ctrl-C, this qbuild was killed, the link was lost - the whole session
is ended there. The exit code comes back by our end mark, so that it is the program's or none.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buildsys.devices.remote_folder import OWN, RemoteFolder
from buildsys.devices.transport import Started, quoted

if TYPE_CHECKING:
    from buildsys.devices.definitions import Run
    from buildsys.devices.progress import Report

SCRIPT = f"{OWN}/run.sh"
BLOCK = 1 << 16
# After the pipe has ended the program has 5 s for TERM, and the link some for the answer.
GRACE = 20.0
TENTHS = " ".join(str(number) for number in range(70))

WATCHED = """exec 3<&0
live={own}/live.$$
rm -f {own}/live.* && : > $live || exit 1
if command -v setsid >/dev/null 2>&1; then
    group=-; setsid sh {script} {args} </dev/null &
else
    group=; sh {script} {args} </dev/null &
fi
program=$!
(
    cat <&3 >/dev/null
    mv $live $live.ended || exit 0
    kill -s TERM -- $group$program
    for second in 1 2 3 4 5; do kill -s 0 -- $group$program || exit 0; sleep 1; done
    kill -s KILL -- $group$program
) >/dev/null 2>&1 &
wait $program
code=$?
rm $live 2>/dev/null && exit $code
# It was ended by us: the answer is given when nothing of it is left.
for tenth in {tenths}; do
    kill -s 0 -- $group$program 2>/dev/null || break
    sleep 0.1
done
exit $code"""


class Ended(NamedTuple):
    """How a run ended. code: the program's own. cause: "" (by itself), "timeout" or "stop".
    seen: the expected text was printed (True where none is expected)."""

    code: int
    cause: str
    seen: bool


def run_script(run: Run, caches: Mapping[str, str], root: str, facts: Mapping[str, str]) -> str:
    """The script that stays on the device, for us and for whoever runs it by hand.

    It takes a cache away that was not made with what is there now, or whose making was cut, and
    it refuses to run where a deploy was cut between two renames. caches: file -> key.
    """
    lines = [
        "#!/bin/sh",
        "# Written by qbuild deploy. Usage: sh .qb/run.sh [ARGUMENTS]",
        'cd -- "$(dirname -- "$0")/.." || exit 3',
        f"if [ -e {OWN}/placing ]; then",
        "    echo 'a deploy was cut here: run qbuild deploy again' >&2; exit 3",
        "fi",
    ]
    for path, key in caches.items():
        note = f"{OWN}/key.{hashlib.sha256(path.encode()).hexdigest()[:16]}"
        lines += [
            f'if [ -e {OWN}/running ] || [ "$(cat {note} 2>/dev/null)" != {key} ]; then',
            f"    rm -f -- {quoted('./' + path)} && echo {key} > {note} || exit 3",
            "fi",
        ]
    words = [filled(word, root, facts) for word in run.argv]
    names = {name: filled(value, root, facts) for name, value in run.environment.items()}
    # The environment is the program's alone: a library path breaks the tools around it.
    variables = "".join(f"{name}={quoted(value)} " for name, value in names.items())
    program = " ".join(quoted(word) for word in words)
    command = f"env {variables}{program}" if variables else program
    lines += [
        f": > {OWN}/running",
        f'{command} "$@"',
        "code=$?",
        f"[ $code -eq {run.exit} ] && rm -f {OWN}/running",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def filled(text: str, root: str, facts: Mapping[str, str]) -> str:
    """`${device.root}`, `${device.machine}` and the like, which only the device knows."""
    for name, value in {**facts, "root": root}.items():
        text = text.replace("${device." + name + "}", value)
    return text


def run_on(
    folder: RemoteFolder,
    run: Run,
    arguments: Sequence[str],
    report: Report,
    stop: threading.Event,
) -> Ended:
    """Run the script that is on the device and pass on what it prints. Raises LinkLost."""
    args = " ".join(quoted(word) for word in arguments)
    script = WATCHED.format(own=OWN, script=SCRIPT, args=args, tenths=TENTHS)
    listening = Expected(run.output)

    def pass_on(stream: str) -> Callable[[bytes], None]:
        def write(data: bytes) -> None:
            listening.hear(data)
            report.output(stream, data)

        return write

    started = Started(folder.transport, folder.enter(script), pass_on("stderr"))
    watch = Ending(started, run.timeout, stop)
    try:
        tail = stream_output(started, pass_on("stdout"))
        _, code = started.end(tail)
    finally:
        watch.over()
        started.close()
        report.end_output()
    return Ended(code, watch.cause, listening.seen)


class Expected:
    """Looks for a text in a stream. It may be cut anywhere, so the end of what came is kept."""

    def __init__(self, text: str | None) -> None:
        self._text = (text or "").encode()
        self._kept = b""
        self.seen = not self._text

    def hear(self, data: bytes) -> None:
        if not self.seen:
            self._kept += data
            self.seen = self._text in self._kept
            self._kept = self._kept[-len(self._text) :]


class Ending:
    """Ends a run when its time is up or `stop` is set: first in order, at last by force."""

    def __init__(self, started: Started, timeout: float, stop: threading.Event) -> None:
        self.cause = ""
        self._started = started
        self._over = threading.Event()
        self._stop = stop
        self._timeout = threading.Timer(timeout, self._end, ("timeout",))
        self._timeout.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def over(self) -> None:
        self._over.set()
        self._timeout.cancel()

    def _wait(self) -> None:
        while not self._over.wait(0.1):
            if self._stop.is_set():
                self._end("stop")
                return

    def _end(self, cause: str) -> None:
        if self.cause or self._over.is_set():
            return
        self.cause = cause
        self._started.close_input()
        if not self._over.wait(GRACE):
            self._started.process.kill()


def stream_output(started: Started, write: Callable[[bytes], None]) -> bytes:
    """Pass on everything that cannot be the end mark; returns what is left: the mark, if any."""
    sign = f"{started.mark}:".encode()
    kept = b""
    while data := os.read(started.stdout.fileno(), BLOCK):
        kept += data
        at = kept.find(sign)
        ready = at if at >= 0 else len(kept) - could_begin(kept, sign)
        if ready:
            write(kept[:ready])
            kept = kept[ready:]
        if kept.startswith(sign) and kept.endswith(b"\n"):
            started.close_input()
    if not kept.startswith(sign) and kept:
        write(kept)
        return b""
    return kept


def could_begin(data: bytes, sign: bytes) -> int:
    """How many bytes at the end of `data` may be the beginning of `sign`."""
    for count in range(min(len(data), len(sign) - 1), 0, -1):
        if data.endswith(sign[:count]):
            return count
    return 0
