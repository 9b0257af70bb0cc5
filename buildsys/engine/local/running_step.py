"""One step that runs, as the supervisor sees it: what it says, what it holds, how it ends."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import TYPE_CHECKING, Literal

from buildsys.engine.executor import Ended, Order, Progress
from buildsys.engine.local import process_tree
from buildsys.engine.local.wire import Lines

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

FIRST_SAMPLE, SLOWEST_SAMPLE = 0.02, 0.1  # seconds between looks at a step's memory
SAMPLING_SHARE = 20  # a look that took t seconds is not repeated for 20 t: at most 5 % of a core
GRACE = 2.0  # seconds from SIGTERM to SIGKILL at a timeout
READ_SIZE = 1 << 16
MIB = 1 << 20

Stop = Literal["timeout", "memory", "cancel"]


class RunningStep:
    """Invariant: `ended` is None until the step's own process has been reaped, and from then
    on its pid is never signalled again."""

    def __init__(
        self, order: Order, pid: int, events: int | None, warnings: tuple[str, ...]
    ) -> None:
        """events: the descriptor by which a rule tells of itself; a program has none."""
        self.order = order
        self.pid = pid
        self.events = events
        self.began = time.monotonic()
        self.cpu = 0.0
        self.strays = 0
        self.members = [pid]
        self.stop: Stop | None = None
        self.ended: float | None = None
        self.memory = 0
        self.silent = False  # nothing more can come from it
        self._lines = Lines()
        self._notes: dict[str, Json] = {}
        self._warnings = list(warnings)
        self._error = ""
        self._traceback = ""
        self._has_result = bool(order.argv)
        self._status = 0
        self._maximum = 0
        self._oom_kills: int | None = None
        self._interval = FIRST_SAMPLE
        self._sample_at = self.began + self._interval
        self._deadline = None if order.timeout is None else self.began + order.timeout
        self._kill_at: float | None = None

    # What it says

    def read_events(self) -> list[Progress]:
        """Take what the step has sent; the progress in it, newest only."""
        progress: list[Progress] = []
        while self.events is not None:
            try:
                data = os.read(self.events, READ_SIZE)
            except BlockingIOError:
                break
            for kind, *values in self._lines.feed(data):
                if kind == "progress":
                    progress = [Progress(self.order.id, *values)]
                else:
                    self._take(kind, values)
            if not data:
                self.silent = True
            if len(data) < READ_SIZE:
                break
        return progress

    def _take(self, kind: str, values: list[Json]) -> None:
        if kind == "note":
            self._notes[values[0]] = values[1]
        elif kind == "warning":
            self._warnings.append(values[0])
        elif kind == "failed":
            self._error, self._traceback, self._has_result = values[0], "".join(values[1:]), True
        elif kind == "made":
            self.memory = max(self.memory, values[0])
            self._has_result = True

    # What it holds, and when it must end

    def due(self) -> float:
        """When `tick` wants to be called next (monotonic seconds)."""
        times = (self._sample_at, self._deadline, self._kill_at)
        return min(at for at in times if at is not None)

    def tick(self, now: float) -> None:
        """Look at the memory, and end what has run or held too much."""
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            self._kill_at = now + GRACE
            self.stop = self.stop or "timeout"
            self.signal_tree(signal.SIGTERM)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self.signal_tree(signal.SIGKILL)
        if now >= self._sample_at:
            self._sample(now)

    def _sample(self, now: float) -> None:
        if self._oom_kills is None:
            self._oom_kills = process_tree.oom_kills()
        self.members = process_tree.tree(self.pid)
        held = process_tree.memory(self.members, floor=self.memory)
        self.memory = max(self.memory, held.proportional)
        limit = self.order.memory_limit
        if limit is not None and held.proportional > limit and self.stop is None:
            self.kill("memory")
        took = time.monotonic() - now
        self._interval = min(2 * self._interval, SLOWEST_SAMPLE)
        self._sample_at = now + max(self._interval, SAMPLING_SHARE * took)

    def kill(self, reason: Stop) -> None:
        """SIGKILL for the whole tree, now."""
        self.stop = self.stop or reason
        self.signal_tree(signal.SIGKILL)

    def signal_tree(self, number: int) -> None:
        """Send a signal to every process of the step that can be seen now. Those that appear
        meanwhile become the supervisor's own children when the step's process is gone."""
        self.members = process_tree.tree(self.pid)
        for pid in self.members:
            kill_quietly(pid, number)

    # How it ends

    def reaped(self, status: int, cpu: float, maximum: int) -> None:
        """The step's own process is gone: its wait status, CPU seconds, ru_maxrss in bytes."""
        self.ended = time.monotonic()
        self._status = status
        self.cpu += cpu
        self._maximum = maximum

    def owns(self, pid: int) -> bool:
        """Is this orphan surely of this step? Only a process that left its session after the
        last look is not sure."""
        if pid in self.members:
            return True
        try:
            return os.getsid(pid) == self.pid
        except ProcessLookupError:
            return False

    def result(self) -> Ended:
        """Everything about the step, after its last process is gone."""
        code = os.waitstatus_to_exitcode(self._status)
        killer = max(-code, 0)
        if not self._has_result and not self._error and code == 0:
            code, self._error = 1, "the step's process ended without a result"
        error = self._reason(code, killer)
        if error and code == 0:
            code = 1
        ended = self.began if self.ended is None else self.ended
        return Ended(
            id=self.order.id,
            code=code if killer == 0 else 128 + killer,
            signal=killer,
            timed_out=self.stop == "timeout",
            over_memory=self.stop == "memory",
            error=error,
            traceback=self._traceback,
            notes=self._notes,
            warnings=tuple(self._warnings),
            wall=ended - self.began,
            cpu=self.cpu,
            # A step shorter than the first look: all that it ever mapped is an upper bound.
            peak_memory=self.memory or self._maximum,
            strays=self.strays,
        )

    def _reason(self, code: int, killer: int) -> str:
        """Why it failed, for a person; empty where it did not."""
        if self.stop == "timeout":
            return f"stopped: it ran longer than its timeout of {self.order.timeout:g} s"
        if self.stop == "memory":
            limit = (self.order.memory_limit or 0) / MIB
            return f"stopped: it held {self.memory / MIB:.0f} MiB; its limit is {limit:.0f} MiB"
        if self.stop == "cancel":
            return "cancelled"
        if self._error:
            return self._error
        if code == 0:
            return ""
        if killer == 0:
            what = self.order.argv[0] if self.order.argv else "the step's process"
            return f"{what} ended with exit status {code}"
        name = signal.Signals(killer).name if killer in set(signal.Signals) else str(killer)
        if killer != signal.SIGKILL:
            return f"killed by {name}"
        if self._oom_kills is not None and process_tree.oom_kills() > self._oom_kills:
            return f"killed by {name}: the machine ran out of memory (the kernel's OOM killer)"
        return f"killed by {name}, not by qbuild: by a person, or for want of memory"


def kill_quietly(pid: int, number: int) -> None:
    """Signal a process that may be gone already, or that is not ours to signal."""
    try:
        os.kill(pid, number)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EPERM):
            raise
