"""Programs as steps: what they get, what they say, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buildsys.engine.executor import Order
from buildsys.engine.local import landlock, process_tree
from tests.engine.local.workshop import Workshop


def test_a_program_runs_in_its_staging_folder_and_its_output_is_in_the_log(
    workshop: Workshop,
) -> None:
    (end,) = workshop.run(workshop.order("a", ("sh", "-c", "pwd; echo made >out; echo bad >&2")))
    assert (end.code, end.signal, end.error) == (0, 0, "")
    staging = workshop.staging("a")
    assert workshop.log("a").read_text() == f"{staging}\nbad\n"
    assert (staging / "out").read_text() == "made\n"
    assert 0 < end.cpu < 1
    assert 0 < end.wall < 10


def test_a_program_sees_its_own_environment_and_nothing_of_the_callers(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "1")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    order = workshop.order("a", ("env",), environment={"DECLARED": "yes"}, threads=3)
    workshop.run(order)
    seen = dict(line.split("=", 1) for line in workshop.log("a").read_text().splitlines())
    staging = workshop.staging("a")
    assert seen["DECLARED"] == "yes"
    assert seen["HOME"] == seen["TMPDIR"] == str(staging)
    assert seen["OMP_NUM_THREADS"] == "3"
    assert not {"SECRET_OF_THE_CALLER", "PYTHONPATH", "USER"} & set(seen)


def test_standard_input_is_empty_and_no_descriptor_leaks(
    workshop: Workshop, tmp_path: Path
) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as lock:
        with_lock = Workshop(tmp_path, lock.fileno())
        code = "import os, sys; print(repr(sys.stdin.read()), sorted(os.listdir('/proc/self/fd')))"
        with_lock.run(with_lock.script("a", code))
        with_lock.executor.close()
    # 3 is the folder that is being listed.
    assert with_lock.log("a").read_text() == "'' ['0', '1', '2', '3']\n"


def test_exit_status_and_signal_are_told_apart(workshop: Workshop) -> None:
    status, crash = workshop.run(
        workshop.order("status", ("sh", "-c", "exit 3")),
        workshop.order("crash", ("sh", "-c", "kill -SEGV $$")),
    )
    assert (status.code, status.signal) == (3, 0)
    assert status.error == "sh ended with exit status 3"
    assert (crash.code, crash.signal) == (128 + signal.SIGSEGV, signal.SIGSEGV)
    assert crash.error == "killed by SIGSEGV"
    assert not list(workshop.staging("crash").glob("core*"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("no-such-program",), "no program 'no-such-program' in PATH"),
        (("./no-such-file",), "cannot run './no-such-file': No such file or directory"),
        (("/etc",), "cannot run '/etc': Permission denied"),
    ],
)
def test_a_program_that_cannot_be_run_is_named(
    workshop: Workshop, argv: tuple[str, ...], words: str
) -> None:
    (end,) = workshop.run(workshop.order("a", argv))
    assert end.code != 0
    assert words in end.error
    assert end.traceback == ""


def test_what_no_system_call_takes_fails_the_step_alone(workshop: Workshop) -> None:
    orders = [
        workshop.order("name", ("true",), environment={"A=B": "x"}),
        workshop.order("value", ("true",), environment={"A": "x\0y"}),
        workshop.order("argument", ("true", "\ud800")),
        workshop.order("sound", ("true",)),
    ]
    ends = {end.id: end for end in workshop.run(*orders)}
    words = {name: end.error for name, end in ends.items()}
    assert words["name"] == "cannot run 'true': illegal environment variable name"
    assert words["value"] == "cannot run 'true': embedded null byte"
    assert words["argument"].startswith("cannot run 'true': 'utf-8' codec can't encode")
    assert words["sound"] == ""


def test_no_signal_is_ignored_or_blocked_whatever_the_caller_does(workshop: Workshop) -> None:
    numbers = (signal.SIGQUIT, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        workshop.run(workshop.order("a", ("grep", "^Sig[IB]", "/proc/self/status")))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    told = dict(line.split(":\t") for line in workshop.log("a").read_text().splitlines())
    assert int(told["SigBlk"], 16) == 0
    # The C library keeps two for itself.
    assert int(told["SigIgn"], 16) & sum(1 << each - 1 for each in signal.valid_signals()) == 0


def test_a_killed_step_is_reported_at_once_with_its_signal(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.order("a", ("sh", "-c", "echo ready; exec sleep 1000")))
    workshop.wait_for_text("a", "ready")
    os.kill(workshop.pid("a"), signal.SIGKILL)
    events = workshop.executor.poll(1.0)
    assert [event.id for event in events] == ["a"]
    workshop.events += events
    end = workshop.ended("a")
    assert end is not None
    assert end.signal == signal.SIGKILL
    assert "killed by SIGKILL, not by qbuild" in end.error


def test_a_step_that_runs_too_long_is_asked_and_then_made_to_end(workshop: Workshop) -> None:
    polite, deaf = workshop.run(
        workshop.order("polite", ("sleep", "1000"), timeout=0.1),
        workshop.order("deaf", ("sh", "-c", "trap '' TERM; sleep 1000 & wait"), timeout=0.1),
    )
    assert polite.timed_out
    assert polite.signal == signal.SIGTERM
    assert polite.wall < 1.5
    assert deaf.timed_out
    assert deaf.signal == signal.SIGKILL
    assert 2 <= deaf.wall < 4
    assert polite.error == "stopped: it ran longer than its timeout of 0.1 s"


def test_a_program_that_ends_well_after_its_timeout_has_failed(workshop: Workshop) -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); signal.pause()"
    (end,) = workshop.run(workshop.script("a", code, timeout=0.2))
    assert end.timed_out
    assert end.code == 1


def test_cancelled_steps_end_and_others_go_on(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.order("a", ("sleep", "1000")))
    waiting = workshop.order("b", ("sh", "-c", "read line <fifo; echo $line"))
    os.mkfifo(workshop.staging("b") / "fifo")
    workshop.executor.submit(waiting)
    workshop.executor.cancel("a")
    workshop.until(lambda: workshop.ended("a") is not None)
    first = workshop.ended("a")
    assert first is not None
    assert first.error == "cancelled"
    assert workshop.ended("b") is None
    workshop.executor.cancel("b")
    workshop.executor.cancel("never heard of")
    workshop.until(lambda: workshop.ended("b") is not None)


def test_an_order_of_any_size_arrives_whole(workshop: Workshop) -> None:
    argument = "x" * 100_000
    code = "import sys; print(sum(map(len, sys.argv[1:])))"
    workshop.run(workshop.script("a", code, *[argument] * 15))
    assert workshop.log("a").read_text() == "1500000\n"


def test_two_orders_of_one_name_are_refused(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.order("a", ("sleep", "1000")))
    with pytest.raises(ValueError, match="already running"):
        workshop.executor.submit(Order("a", "", ("true",), {}, {}, "", "", "light", 1, None, None))


confined = pytest.mark.skipif(landlock.abi() == 0, reason="this kernel has no Landlock")


@confined
def test_a_confined_program_writes_only_where_it_may(workshop: Workshop, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    attempts = {
        "write": f"open({str(victim)!r}, 'w')",
        "truncate": f"os.truncate({str(victim)!r}, 0)",
        "create": f"open({str(tmp_path / 'new')!r}, 'w')",
        "remove": f"os.unlink({str(victim)!r})",
        "link": f"os.link({str(victim)!r}, 'stolen')",
        "move": f"os.rename({str(victim)!r}, 'stolen')",
        "device": "os.mknod('device', 0o060600, os.makedev(8, 0))",
    }
    code = "import os\nfor name, attempt in eval(os.environ['ATTEMPTS']).items():\n"
    code += " try: eval(attempt)\n except OSError as error: print(name, error.strerror)\n"
    code += "os.makedirs('a/b'); os.makedirs('c'); open('a/b/f', 'w').write('1')\n"
    code += "os.rename('a/b/f', 'c/f'); os.truncate('c/f', 0); os.symlink('f', 'c/link')\n"
    code += (
        "open(os.environ['ALLOWED'] + '/f', 'w').write('1'); open('/dev/null', 'w').write('1')\n"
    )
    code += f"print(open({str(victim)!r}).read())"
    environment = {"ATTEMPTS": repr(attempts), "ALLOWED": str(allowed)}
    order = workshop.script("a", code, environment=environment, writable=(str(allowed),))
    (end,) = workshop.run(order)
    log = workshop.log("a").read_text().splitlines()
    assert end.code == 0, log
    refused = dict(line.split(" ", 1) for line in log[:-1])
    assert refused.keys() == attempts.keys()
    # Moving and linking out of a folder without rights is told as crossing a device.
    assert set(refused.values()) <= {"Permission denied", "Invalid cross-device link"}
    assert refused["write"] == "Permission denied"
    assert log[-1] == victim.read_text() == "precious"
    assert (allowed / "f").read_text() == "1"
    assert end.warnings == ()


@pytest.mark.skipif(landlock.abi() < 6, reason="this kernel cannot scope signals")
def test_a_confined_program_cannot_signal_what_it_did_not_start(workshop: Workshop) -> None:
    code = "import os, sys\ntry: os.kill(int(sys.argv[1]), 0)\n"
    code += "except PermissionError: print('refused')\n"
    code += "child = os.fork() or os._exit(0)\nos.kill(child, 0); os.wait()"
    (end,) = workshop.run(workshop.script("a", code, str(os.getpid())))
    assert workshop.log("a").read_text() == "refused\n"
    assert end.code == 0


@confined
def test_rights_that_a_kernel_does_not_know_are_not_asked_of_it() -> None:
    ladder = [landlock.handled_rights(version) for version in range(1, 8)]
    assert ladder[0] == (1 << 13) - 1
    assert ladder[1] & ~ladder[0] == landlock.REFER
    assert ladder[2] & ~ladder[1] == landlock.TRUNCATE
    assert ladder[4] & ~ladder[3] == landlock.IOCTL_DEV
    assert ladder[4] == ladder[-1]


def test_a_hundred_short_steps_cost_little(workshop: Workshop) -> None:
    """The supervisor's and its lanes' own share, in CPU time, of a hundred steps; 0.7 ms each
    when measured."""
    first = [workshop.order(f"first{number}", ("true",)) for number in range(2)]
    workshop.run(*first)
    supervisor = workshop.executor.supervisor_pid
    assert supervisor is not None
    watched = [supervisor, *process_tree.children(supervisor)]
    before = sum(map(_cpu_seconds, watched))
    for number in range(50):
        orders = [workshop.order(f"step{number}-{place}", ("true",)) for place in range(2)]
        workshop.run(*orders)
    assert [supervisor, *process_tree.children(supervisor)] == watched, "a lane was made anew"
    assert sum(map(_cpu_seconds, watched)) - before < 0.4


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_supervisor_starts_without_heavy_imports() -> None:
    code = (
        "import sys, buildsys.engine.local.supervisor as s;"
        "heavy = {'pathlib', 'logging', 'dataclasses', 'numpy', 'torch', 'asyncio', 'subprocess'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = str(Path(landlock.__file__).parents[3])
    argv = [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"]
    assert subprocess.check_output(argv, text=True) == "[]\n"
