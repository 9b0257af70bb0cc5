"""Programs run as they were meant, are believed only if they ended, and never outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from buildsys.devices.errors import DeviceError, LinkLost
from buildsys.devices.running import could_begin
from tests.devices.phone import REPOSITORY, Phone
from tests.devices.targets import Target
from tests.devices.test_faults import mend

NASTY = (
    "two words", "$(touch PWNED)", "`touch PWNED`", "a'b", 'a"b', "a;touch PWNED", "a\nb", "*", "~",
    "-rf", "--", "$HOME", "a\\b", "{{ 7 }}", "", "é ☃ 😀", "!x", "#x", "a&b|c>d<e", "\t", "%s\\n",
)  # fmt: skip
PRINT_ARGUMENTS = 'for each in "$@"; do printf "%s\\0" "$each"; done'
# Says who it is, then waits for an end that only we can bring.
ENDLESS = "cut -d ' ' -f 6 /proc/$$/stat | sed 's/^/session /'; trap '' INT; sleep 1000 & wait"


def test_arguments_and_environment_arrive_as_they_are(target: Target) -> None:
    script = f'{PRINT_ARGUMENTS}; printf "%s\\0%s\\0" "$ADSP_LIBRARY_PATH" "$HERE"'
    paths = "/a b;/vendor/dsp;$(touch PWNED)"
    environment = {"ADSP_LIBRARY_PATH": paths, "HERE": "${device.root}/lib"}
    program = target.program(script, environment=environment, argv=("./program", "first one"))
    assert target.deploy(program, run=True, arguments=NASTY) == 0
    expected = ("first one", *NASTY, paths, f"{target.device.root}/lib")
    assert target.notes.printed["stdout"].decode().split("\0")[:-1] == list(expected)
    assert not list(target.here.rglob("PWNED"))


@pytest.mark.parametrize("code", [0, 1, 3, 7, 124, 137, 255])
def test_the_programs_exit_code_is_passed_through(target: Target, code: int) -> None:
    assert target.deploy(target.program(f"exit {code}"), run=True) == code


def test_output_is_passed_on_byte_for_byte(target: Target) -> None:
    """NUL, colours, no newline at the end, and an end mark that is not ours."""
    fake = r"\0\n0123456789abcdef0123456789abcdef:0\n\033[31mred\r\n\n\nno end"
    program = target.program(f"printf '{fake}'; printf 'bad\\n\\001' >&2; exit 5")
    assert target.deploy(program, run=True) == 5
    want = b"\0\n0123456789abcdef0123456789abcdef:0\n\033[31mred\r\n\n\nno end"
    assert target.notes.printed == {"stdout": want, "stderr": b"bad\n\x01"}


def test_output_comes_while_the_program_runs(target: Target) -> None:
    """A program that waits for us to have read its prompt."""
    flag = target.here / "go"

    def heard(kind: str) -> None:
        if target.notes.printed["stdout"] == b"prompt> ":
            flag.touch(mode=0o666)

    script = "printf 'prompt> '; while [ ! -e go ]; do sleep 0.05; done; echo on"
    assert target.deploy(target.program(script), run=True, on=heard) == 0
    assert target.notes.printed["stdout"] == b"prompt> on\n"


def test_a_program_that_never_ends_is_ended(target: Target) -> None:
    assert target.deploy(target.program(ENDLESS, timeout=1.0), run=True) == 124
    assert is_gone(target)


def test_stop_ends_the_program_there(target: Target) -> None:
    """What Ctrl-C does in the command."""
    stop = threading.Event()

    def heard(kind: str) -> None:
        if kind == "output":
            stop.set()

    assert target.deploy(target.program(ENDLESS), run=True, stop=stop, on=heard) == 130
    assert is_gone(target)


def is_gone(target: Target) -> bool:
    """Is nothing left of the program's session? Asked of the device itself."""
    session = target.notes.printed["stdout"].split()[1].decode()
    script = (
        "for each in /proc/[0-9]*/stat; do cut -d ' ' -f 3,6 $each; done 2>/dev/null "
        f"| grep -c '^[^Z] {session}$'"
    )
    if target.kind == "adb":
        said = target.machine.shell(f"{script}; true")
    else:
        words = ["sh", "-c", script]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return said.strip() == "0"


@pytest.mark.parametrize("client", ["root", "client29"])
def test_a_link_lost_while_it_runs_is_no_success(
    client: str, phone: Phone, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """adb itself ends with 0 here, in both versions."""
    from tests.devices.conftest import make_target

    monkeypatch.setenv("ADB", str(phone.client(client)))
    target = make_target("adb", request, tmp_path)
    target.deploy(target.program(ENDLESS))

    def heard(kind: str) -> None:
        if kind == "output":
            phone.order(cut=True)

    with pytest.raises(LinkLost) as caught:
        target.deploy(target.program(ENDLESS), run=True, on=heard)
    assert caught.value.exit_code == 3
    assert (target.here / ".qb/running").exists()
    lost = target.notes
    mend(target)
    assert target.deploy(target.program("echo ran"), run=True) == 0  # the lock is free: it ended
    target.notes = lost
    assert is_gone(target)


def test_a_board_lost_while_it_runs_is_no_success(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from tests.devices.conftest import make_target

    target = make_target("ssh", request, tmp_path)

    def heard(kind: str) -> None:
        if kind == "output":
            target.machine.cable.cut()

    with pytest.raises(LinkLost):
        target.deploy(target.program(ENDLESS), run=True, on=heard)


RUN = """
import sys
from pathlib import Path
from tests.devices.targets import Target
kind, root, here, store = sys.argv[1:]
target = Target(kind, root, Path(here), {}, None, Path(store))
target.deploy(target.program(Path(store, "script").read_text()), run=True,
              on=lambda kind: kind == "output" and print(target.notes.printed, flush=True))
"""


def test_killed_while_it_runs_the_program_ends(local: Target) -> None:
    """SIGKILL gives no time to say anything: the pipe's end says it."""
    (local.store / "script").write_text(ENDLESS + "; echo never")
    words = [local.kind, local.device.root, str(local.here), str(local.store)]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *words], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline().split("session ")[1].split("\\n")[0])
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The next deploy takes the lock, which the run holds until it is over.
    assert local.deploy(local.program("echo ran"), run=True) == 0
    wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    """Blocks until a process that is not our child has ended."""
    import os
    import select

    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ready, _, _ = select.select([handle], [], [], 30)
    os.close(handle)
    assert ready, f"process {pid} still runs"


def test_an_expectation_that_is_not_met_fails(target: Target) -> None:
    script = "printf 'The cat '; printf 'sat.'"
    assert target.deploy(target.program(script, output="cat sat"), run=True) == 0
    assert target.deploy(target.program(script, output="dog"), run=True) == 1
    assert target.deploy(target.program("exit 7", exit=7), run=True) == 0


def test_caches_go_before_new_models_come(target: Target) -> None:
    """Kept while what they were made from stays, gone when it changes, whatever happens."""
    cache = "bin/qnn_context.bin"
    target.device = replace(target.device, invalidates={cache: ("int8.mllm", "lib*.so")})
    make = f"mkdir -p bin; if [ -e {cache} ]; then cat {cache}; else cat int8.mllm > {cache}; fi"
    program = target.program(make)
    target.deploy(target.file("int8.mllm", b"one"), program, run=True)
    target.deploy(target.file("int8.mllm", b"one"), program, run=True)
    assert target.notes.printed["stdout"] == b"one"
    seen = []

    def look(kind: str) -> None:
        if kind == "sending":
            seen.append(target.content()[cache])

    target.deploy(target.file("int8.mllm", b"two"), program, on=look)
    assert set(seen) == {b"one"}
    assert cache not in target.content()
    target.deploy(target.file("int8.mllm", b"two"), program, run=True)
    assert target.content()[cache] == b"two"
    target.deploy(target.file("int8.mllm", b"two"), target.file("other", b"1"), program)
    assert target.content()[cache] == b"two"
    target.deploy(target.file("int8.mllm", b"two"), target.file("libX.so", b"1"), program)
    assert cache not in target.content()


def test_a_cache_whose_making_was_cut_is_not_believed(local: Target) -> None:
    """mllm loads any qnn_context.bin that exists, a torn one as well."""
    local.device = replace(local.device, invalidates={"cache": ("model",)})
    local.deploy(local.file("model", b"1"), local.program("printf to > cache; exit 9"), run=True)
    assert local.content()["cache"] == b"to"
    local.deploy(local.file("model", b"1"), local.program("cat cache; exit 9"), run=True)
    assert local.notes.printed["stdout"] == b""


def test_a_model_changed_by_hand_run_by_hand_does_not_use_the_cache(local: Target) -> None:
    """The key travels with the run script, so that also a run without qbuild compares it."""
    local.device = replace(local.device, invalidates={"cache": ("model",)})
    program = local.program("[ -e cache ] || cat model > cache; cat cache")
    script = local.here / ".qb/run.sh"
    local.deploy(local.file("model", b"1"), program)
    words = ["sh", str(script)]
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"1"
    local.deploy(local.file("model", b"2"), program)
    (local.here / "cache").write_bytes(b"1")  # as if an old run had ended after the deploy
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"2"


def test_results_come_back_whole(target: Target) -> None:
    program = target.program("mkdir -p out; head -c 300000 program /dev/zero > out/log")
    target.device = replace(target.device, pull={"out/log": "logs/run.log"})
    assert target.deploy(program, run=True) == 0
    result = target.store / "results/it/logs/run.log"
    assert result.read_bytes() == target.content()["out/log"]
    assert [path.name for path in result.parent.iterdir()] == ["run.log"]


def test_a_full_disk_here_keeps_the_results_that_were_here(target: Target) -> None:
    program = target.program("echo old > log")
    target.device = replace(target.device, pull={"log": "run.log"})
    assert target.deploy(program, run=True) == 0
    result = target.store / "results/it/run.log"
    program = target.program("head -c 3000000 /dev/zero > log")
    # The kernel's own device for a disk without room, where the new result is written first.
    (result.parent / f"run.log.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(DeviceError, match=r"run\.log on this machine: No space left") as caught:
        target.deploy(program, run=True)
    assert caught.value.remedy == "make room here and run it again"
    assert {path.name: path.read_text() for path in result.parent.iterdir()} == {"run.log": "old\n"}
    assert target.deploy(program, run=True) == 0
    assert result.read_bytes() == bytes(3_000_000)


@pytest.mark.parametrize(
    ("data", "sign", "count"), [(b"abx", b"xy:", 1), (b"xyzxy", b"xy:", 2), (b"", b"x:", 0)]
)
def test_what_may_be_an_end_mark_is_held_back(data: bytes, sign: bytes, count: int) -> None:
    assert could_begin(data, sign) == count
