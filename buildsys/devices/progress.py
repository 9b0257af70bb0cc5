"""What a deploy tells: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

REDRAW = 0.2
CLEAR = "\r\x1b[K"
_WRITING = threading.Lock()


class Report:
    """Tells of one device. prefix: "phone: " where there are several, else "".

    Everything that is written passes `_WRITING`, so that the lines of several devices do not mix.
    """

    def __init__(self, device: str, *, prefix: str = "", as_json: bool = False) -> None:
        self.device = device
        self.prefix = prefix
        self.as_json = as_json
        self._live = not as_json and not prefix and sys.stderr.isatty()
        self._drawn = 0.0
        self._partial = {"stdout": b"", "stderr": b""}

    def event(self, kind: str, text: str = "", **facts: Json) -> None:
        """Something happened: `text` for people (nothing where it is empty)."""
        if self.as_json:
            self._json({"event": kind, **facts})
        elif text:
            self._write(sys.stderr, f"{CLEAR if self._live else ''}{self.prefix}{text}\n")

    def progress(self, file: str, done: int, total: int, rate: float) -> None:
        """Bytes of all files, and bytes per second; at most five times a second."""
        now = time.monotonic()
        if now - self._drawn < REDRAW:
            return
        self._drawn = now
        left = (total - done) / rate if rate > 0 else 0.0
        if self.as_json:
            facts = {"file": file, "done": done, "total": total}
            self._json({"event": "progress", **facts, "rate": round(rate), "left": round(left, 1)})
        elif self._live:
            line = f"{file}: {amount(done)} of {amount(total)}, {amount(rate)}/s, {left:.0f} s left"
            self._write(sys.stderr, f"{CLEAR}{line}")

    def output(self, stream: str, data: bytes) -> None:
        """What the program on the device printed. stream: "stdout" or "stderr"."""
        if self.as_json:
            text = data.decode(errors="replace")
            self._json({"event": "output", "stream": stream, "text": text})
        elif self.prefix:
            self._prefixed(stream, data)
        else:
            sink = getattr(sys, stream)
            with _WRITING:
                sink.buffer.write(data)
                sink.buffer.flush()

    def end_output(self) -> None:
        """The last lines, where they do not end in a newline."""
        for stream, rest in self._partial.items():
            if rest:
                self._prefixed(stream, b"\n")

    def _prefixed(self, stream: str, data: bytes) -> None:
        *lines, rest = (self._partial[stream] + data).split(b"\n")
        self._partial[stream] = rest
        text = "".join(f"{self.prefix}{line.decode(errors='replace')}\n" for line in lines)
        self._write(getattr(sys, stream), text)

    def _json(self, facts: dict[str, Json]) -> None:
        self._write(sys.stdout, json.dumps({"device": self.device, **facts}) + "\n")

    def _write(self, sink: TextIO, text: str) -> None:
        with _WRITING:
            sink.write(text)
            sink.flush()


def amount(count: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
