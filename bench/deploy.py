"""Deploying, side by side with `adb push` and `rsync` in the same run.

    python bench/deploy.py [--size MIB] [--rounds N]

The phone is Debian's adbd with Android's shell and userland, the board Debian's sshd, both on
loopback (tests/devices). Each figure is the best of several rounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from buildsys.devices.definitions import transport_of
from buildsys.devices.payload import PushFile
from buildsys.devices.remote_folder import RemoteFolder, pump
from buildsys.devices.transport import Started

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.devices.board import Board
from tests.devices.phone import SERIAL, Phone
from tests.devices.phone_namespace import library_path
from tests.devices.targets import Target

MIB = 1 << 20
ROOT = "/data/local/tmp/qbuild"


class Rounds:
    """How often each figure is taken; the command line says."""

    count = 3


def best(action: Callable[[], None], before: Callable[[], None]) -> float:
    """Seconds of the fastest of several rounds; `before` is not timed."""
    found = []
    for _ in range(Rounds.count):
        before()
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return min(found)


def raw_file(folder: Path, size: int) -> Path:
    """`size` MiB that no compression makes smaller."""
    path = folder / "model.mllm"
    with path.open("wb") as file:
        for _ in range(size):
            file.write(os.urandom(MIB))
    return path


def send_only(target: Target, file: PushFile) -> Callable[[], None]:
    """Send one file to its part; the device computes its digest, which the peers do not."""

    def action() -> None:
        transport = transport_of(target.device)
        transport.connect()
        folder = RemoteFolder(transport, target.device.root)
        found = folder.send(file.path, file.facts.sha256, lambda sent: None, threading.Event())
        transport.close()
        assert found == file.facts.sha256

    return action


def send_bare(target: Target, file: PushFile) -> Callable[[], None]:
    """What the peers do: the bytes, and that they have arrived; no digest."""

    def action() -> None:
        transport = transport_of(target.device)
        transport.connect()
        script = RemoteFolder(transport, target.device.root).enter("cat >> .qb/bare.part")
        started = Started(transport, script)
        with Path(file.path).open("rb") as source:
            pump(
                source.fileno(),
                started.stdin.fileno(),
                0,
                file.facts.size,
                lambda sent: None,
                threading.Event(),
            )
        started.close_input()
        _, code = started.end(started.stdout.read())
        started.close()
        transport.close()
        assert code == 0

    return action


def told(name: str, seconds: float, size: int, peer: float | None = None) -> None:
    ratio = f", {seconds / peer:.2f} of the peer's time" if peer else ""
    print(f"{name:56} {seconds:7.2f} s {size / seconds:7.0f} MiB/s{ratio}", flush=True)


def run(argv: list[str], environment: dict[str, str] | None = None) -> None:
    subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True
    )


def bench_phone(phone: Phone, target: Target, file: PushFile, size: int) -> None:
    environment = {**os.environ, **phone.environment()}
    adb = [str(phone.client()), "-s", SERIAL]
    clean = f"rm -rf {ROOT}; mkdir -p {ROOT}/.qb"

    def empty() -> None:
        phone.shell(clean)

    def push() -> None:
        run([*adb, "push", file.path, f"{ROOT}/model"], environment)

    def push_and_compare() -> None:
        push()
        phone.shell(f"sha256sum {ROOT}/model")

    alone = best(push, empty)
    told("adb push", alone, size)
    compared = best(push_and_compare, empty)
    told("adb push, then sha256sum on the phone", compared, size)
    ours = best(send_only(target, file), empty)
    told("qbuild: send, sha256sum on the phone", ours, size, compared)
    bare = best(send_bare(target, file), empty)
    told("qbuild: the sending alone", bare, size, alone)
    whole = best(lambda: check(target.deploy(file)), empty)
    told("qbuild: a whole first deploy", whole, size, compared)


def bench_board(board: Board, target: Target, file: PushFile, size: int) -> None:
    where = board.where()
    ssh = (
        f"ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -p {where['port']} "
        f"-i {where['identity']} -o UserKnownHostsFile={where['known_hosts']}"
    )
    libraries = {**os.environ, "LD_LIBRARY_PATH": library_path(board.packages)}
    program = str(board.packages / "root/usr/bin/rsync")
    words = [
        program,
        "-W",
        "--fsync",
        f"--rsync-path=env LD_LIBRARY_PATH={libraries['LD_LIBRARY_PATH']} {program}",
        "-e",
        ssh,
    ]

    def empty() -> None:
        subprocess.run(["rm", "-rf", str(target.here)], check=True)
        (target.here / ".qb").mkdir(parents=True)

    def rsync() -> None:
        run([*words, file.path, f"{where['user']}@127.0.0.1:{target.here}/model"], libraries)

    def rsync_and_compare() -> None:
        rsync()
        run([*ssh.split(), "127.0.0.1", f"sha256sum {target.here}/model"])

    alone = best(rsync, empty)
    told("rsync -W --fsync", alone, size)
    compared = best(rsync_and_compare, empty)
    told("rsync, then sha256sum on the board", compared, size)
    ours = best(send_only(target, file), empty)
    told("qbuild: send, sha256sum on the board", ours, size, compared)
    bare = best(send_bare(target, file), empty)
    told("qbuild: the sending alone", bare, size, alone)
    whole = best(lambda: check(target.deploy(file)), empty)
    told("qbuild: a whole first deploy", whole, size, compared)


def check(code: int) -> None:
    assert code == 0


def bench_redeploy(target: Target) -> None:
    files = [target.file(f"f{number}", os.urandom(MIB)) for number in range(10)]
    target.deploy(*files)
    seconds = best(lambda: check(target.deploy(*files)), lambda: None)
    assert not target.notes.of("sending")
    print(f"{target.kind}: an unchanged redeploy of 10 files {seconds:25.2f} s", flush=True)


def bench_resume(target: Target, cut: Callable[[int], None], mend: Callable[[], None]) -> None:
    """Cut in the middle of 64 MiB; what the second deploy sends."""
    target.device = replace(target.device, root=f"{target.device.root}-resume")
    file = target.file("resumed", os.urandom(64 * MIB))
    cut(40 * MIB)
    try:
        target.deploy(file)
    except Exception as error:  # the cut; what matters is what the next deploy does
        print(f"{target.kind}: {str(error).splitlines()[0]}")
    mend()
    target.deploy(file)
    sent = target.notes.sent / MIB
    print(f"{target.kind}: cut after 40 of 64 MiB, the second deploy sends {sent:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    words = parser.parse_args()
    size = words.size
    Rounds.count = words.rounds
    with tempfile.TemporaryDirectory(prefix="qbuild-bench-") as name:
        base = Path(name)
        for each in ("phone", "board", "host", "at"):
            (base / each).mkdir()
        model = raw_file(base / "host", size)
        phone, board = Phone(base / "phone"), Board(base / "board")
        os.environ.update(phone.environment())
        at_phone = Target(
            "adb", ROOT, phone.root / ROOT[1:], {"serial": SERIAL}, phone, base / "host"
        )
        there = base / "at/qbuild"
        at_board = Target("ssh", str(there), there, board.where(), board, base / "host")
        file = PushFile("model", str(model), 0o644, "model", at_phone.memory.of(str(model)))
        try:
            bench_phone(phone, at_phone, file, size)
            bench_board(board, at_board, file, size)
            for target in (at_phone, at_board):
                bench_redeploy(target)
            bench_resume(
                at_phone,
                lambda count: phone.order(cut_after=count),
                lambda: phone.order(mend=True),
            )
            bench_resume(at_board, board.cable.cut_after, board.cable.mend)
        finally:
            phone.close()
            board.close()


if __name__ == "__main__":
    main()
