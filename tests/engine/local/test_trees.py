"""Nothing that a step starts outlives it, and nothing that qbuild starts outlives qbuild."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from buildsys.engine.local import process_tree
from tests.engine.local.workshop import DEADLINE, Workshop, is_alive

# Leaves its parent, its session, its environment and its folder, says who it is, and stays.
DAEMON = """
import os, signal, sys
def daemon():
    if os.fork(): return os.wait()
    os.setsid()
    if os.fork(): os._exit(0)
    os.chdir('/')
    for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)
    say = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    os.execve(sys.executable, [sys.executable, '-S', '-c', say], {})
"""


def pids_in(text: str) -> list[int]:
    return [int(line) for line in text.splitlines() if line.isdigit()]


def test_a_daemon_that_left_its_session_ends_with_its_step(workshop: Workshop) -> None:
    code = (
        DAEMON
        + "daemon(); daemon()\nwhile open(sys.argv[1]).read().count('\\n') < 2: os.sched_yield()"
    )
    log = str(workshop.log("a"))
    workshop.executor.submit(workshop.order("other", ("sleep", "1000")))
    (end,) = workshop.run(workshop.script("a", code, log))
    assert end.code == 0
    assert end.strays == 2
    daemons = pids_in(workshop.log("a").read_text())
    assert len(daemons) == 2
    assert not any(map(is_alive, daemons))
    assert is_alive(workshop.pid("other"))


def test_the_tree_of_a_killed_step_is_killed(workshop: Workshop) -> None:
    code = (
        DAEMON
        + "daemon()\nif os.fork(): signal.pause()\nprint(os.getpid(), flush=True)\nsignal.pause()"
    )
    workshop.executor.submit(workshop.script("a", code))
    workshop.until(lambda: len(pids_in(_text(workshop.log("a")))) == 2)
    workshop.executor.cancel("a")
    workshop.until(lambda: workshop.ended("a") is not None)
    assert not any(map(is_alive, pids_in(workshop.log("a").read_text())))
    end = workshop.ended("a")
    assert end is not None
    assert end.strays == 0, "what qbuild ended itself is not called astray"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_closing_ends_everything_that_runs(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.script("a", DAEMON + "daemon(); signal.pause()"))
    workshop.until(lambda: len(pids_in(_text(workshop.log("a")))) == 1)
    pid = workshop.pid("a")
    supervisor = workshop.executor.supervisor_pid
    assert supervisor is not None
    workshop.executor.close()
    daemon = pids_in(workshop.log("a").read_text())
    assert not any(map(is_alive, [supervisor, pid, *daemon]))
    workshop.executor.close()


QBUILD = """
import fcntl, os, signal, sys, json
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from tests.engine.local.workshop import Workshop
lock = os.open(sys.argv[2] + '/lock', os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
workshop = Workshop(Path(sys.argv[2]), lock)
workshop.executor.submit(workshop.script('a', sys.argv[3]))
workshop.wait_for_text('a', '\\n')
print(workshop.executor.supervisor_pid, flush=True)
signal.pause()
"""


def test_the_orphans_of_a_killed_qbuild_are_gone_before_its_lock_is_free(tmp_path: Path) -> None:
    code = DAEMON + "daemon(); signal.pause()"
    argv = [sys.executable, "-c", QBUILD, json.dumps(sys.path), str(tmp_path), code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as qbuild:
        assert qbuild.stdout is not None
        supervisor = int(qbuild.stdout.readline())
        step = process_tree.children(supervisor)
        (daemon,) = pids_in((tmp_path / "a.log").read_text())
        assert all(map(is_alive, [supervisor, daemon, *step]))
        # The terminal's Ctrl-C reaches qbuild's group; the supervisor must not be in it.
        assert os.getsid(supervisor) == supervisor != os.getsid(qbuild.pid)
        os.kill(supervisor, signal.SIGSTOP)
        qbuild.kill()
        qbuild.wait()
        with (tmp_path / "lock").open() as lock:
            assert not _acquired(lock.fileno()), "the supervisor holds it still"
            os.kill(supervisor, signal.SIGCONT)
            deadline = time.monotonic() + DEADLINE
            while not _acquired(lock.fileno()):
                assert time.monotonic() < deadline
                os.sched_yield()
            assert not any(map(is_alive, [daemon, *step]))


def _acquired(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_a_killed_supervisor_takes_the_steps_with_it_and_is_reported(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.order("a", ("sh", "-c", "echo ready; exec sleep 1000")))
    workshop.wait_for_text("a", "ready")
    pid = workshop.pid("a")
    supervisor = workshop.executor.supervisor_pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    workshop.until(lambda: workshop.ended("a") is not None)
    end = workshop.ended("a")
    assert end is not None
    assert end.code == 1
    assert "supervises the steps ended unexpectedly (killed by SIGKILL)" in end.error
    workshop.until(lambda: not is_alive(pid))
    (again,) = workshop.run(workshop.order("b", ("true",)))
    assert again.code == 0


def test_a_killed_supervisor_takes_daemons_with_it_and_their_lane(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.script("a", DAEMON + "daemon(); signal.pause()"))
    workshop.until(lambda: len(pids_in(_text(workshop.log("a")))) == 1)
    supervisor = workshop.executor.supervisor_pid
    assert supervisor is not None
    (lane,) = process_tree.children(supervisor)
    below = [pid for pid in process_tree.tree(lane) if pid != lane]
    assert len(below) == 2
    os.kill(supervisor, signal.SIGKILL)
    workshop.until(lambda: workshop.ended("a") is not None)
    assert not any(map(is_alive, below)), "told before the last of them was gone"
    # Its end is told by its socket, which the kernel closes a moment before the process is gone.
    workshop.until(lambda: not is_alive(lane))


def test_a_killed_lane_costs_its_step_and_nobody_else(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.order("other", ("sleep", "1000")))
    workshop.executor.submit(workshop.script("a", DAEMON + "daemon(); signal.pause()"))
    workshop.until(lambda: len(pids_in(_text(workshop.log("a")))) == 1)
    tree = [workshop.pid("a"), *pids_in(workshop.log("a").read_text())]
    parent = process_tree.state(tree[0])
    assert parent is not None
    os.kill(parent[1], signal.SIGKILL)
    workshop.until(lambda: workshop.ended("a") is not None)
    end = workshop.ended("a")
    assert end is not None
    assert "supervises the steps ended unexpectedly (killed by SIGKILL)" in end.error
    assert not any(map(is_alive, tree)), "told before the last of them was gone"
    assert is_alive(workshop.pid("other"))
    (again,) = workshop.run(workshop.order("b", ("true",)))
    assert again.code == 0


def test_a_lane_that_was_killed_while_it_was_free_is_not_used_again(workshop: Workshop) -> None:
    workshop.run(workshop.order("a", ("true",)))
    supervisor = workshop.executor.supervisor_pid
    assert supervisor is not None
    (lane,) = process_tree.children(supervisor)
    os.kill(lane, signal.SIGKILL)
    (end,) = workshop.run(workshop.order("b", ("true",)))
    if end.code != 0:  # it was given to the lane before that was known to be dead
        assert "supervises the steps ended unexpectedly" in end.error
        (end,) = workshop.run(workshop.order("c", ("true",)))
    assert end.code == 0


def test_a_supervisor_that_is_asked_to_end_ends_everything(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.order("a", ("sh", "-c", "echo ready; exec sleep 1000")))
    workshop.wait_for_text("a", "ready")
    pid = workshop.pid("a")
    assert workshop.executor.supervisor_pid is not None
    os.kill(workshop.executor.supervisor_pid, signal.SIGTERM)
    workshop.until(lambda: workshop.ended("a") is not None)
    assert not is_alive(pid)


ALLOCATES = """
import os, sys
def allocate(count):
    block = bytearray(count << 20)
    for at in range(0, len(block), 4096): block[at] = 1
    return block
"""


def test_a_tree_that_holds_too_much_is_ended_and_says_so(workshop: Workshop) -> None:
    code = ALLOCATES + ("child = os.fork()\nblock = allocate(60)\nimport signal; signal.pause()")
    (end,) = workshop.run(workshop.script("a", code, memory_limit=100 << 20))
    assert end.over_memory
    assert end.signal == signal.SIGKILL
    assert 100 << 20 < end.peak_memory < 150 << 20
    assert end.error.endswith("MiB; its limit is 100 MiB")


def test_mapped_files_are_not_counted_as_memory(workshop: Workshop) -> None:
    """A step that maps a checkpoint must not look like one that holds it."""
    code = (
        "import mmap, os\n"
        "with open('big', 'wb') as f: f.write(bytes(80 << 20))\n"
        "f = open('big', 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "s = sum(m[i] for i in range(0, len(m), 4096))\n"
        "print('mapped', flush=True); import signal; signal.pause()"
    )
    workshop.executor.submit(workshop.script("a", code, memory_limit=60 << 20))
    workshop.wait_for_text("a", "mapped")
    pid = workshop.pid("a")
    resident = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]
    held = process_tree.memory([pid], floor=0)
    assert int(resident) << 10 > 80 << 20
    assert held.proportional < 30 << 20
    workshop.executor.cancel("a")


def test_memory_that_processes_share_is_counted_once(workshop: Workshop) -> None:
    code = ALLOCATES + (
        "block = allocate(60)\n"
        "for _ in range(3):\n"
        " if os.fork() == 0: break\n"
        "else: print('forked', flush=True)\n"
        "import signal; signal.pause()"
    )
    workshop.executor.submit(workshop.script("a", code))
    workshop.wait_for_text("a", "forked")
    pid = workshop.pid("a")
    members = process_tree.tree(pid)
    assert len(members) == 4
    held = process_tree.memory(members, floor=0)
    assert held.resident > 240 << 20
    assert 60 << 20 <= held.proportional < 100 << 20
    assert process_tree.memory(members, floor=held.resident).proportional <= held.resident
    workshop.executor.cancel("a")


def test_children_are_found_on_kernels_that_do_not_list_them(workshop: Workshop) -> None:
    code = "import os, signal; os.fork() and os.fork(); print('here', flush=True); signal.pause()"
    workshop.executor.submit(workshop.script("a", code))
    workshop.until(lambda: _text(workshop.log("a")).count("here") == 3)
    listed = process_tree.children(workshop.pid("a"))
    assert len(listed) == 2
    assert set(process_tree.children_by_search(workshop.pid("a"))) == set(listed)
    assert process_tree.children(listed[0]) == process_tree.children_by_search(listed[0]) == []
