"""Faults: a build whose steps run on Dask workers loses one of them, itself, or the scheduler."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

from buildsys.store.garbage import ABANDONED, collect
from buildsys.store.local import Store
from tests.engine.dask.crew import Crew, Running
from tests.faults.killing import DEADLINE, command_line, wait
from tests.faults.project import LONGEST
from tests.faults.registry import fault
from tests.faults.world import ROOT, Skip, World, expect, family, killed_in_the_end

WORKERS = 2
STEP = b"set -e; d="  # what the command line of every step has in it
GONE = 2.0  # seconds until nothing of a dead build runs any more


class Company:
    """A scheduler and two workers, for all rounds of this process: to start them costs more CPU
    than a build. Who was killed is replaced when the next round begins."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="faults-dask-"))
        self._crew: Crew | None = None
        self._count = 0
        self.workers: list[Running] = []

    @property
    def crew(self) -> Crew:
        assert self._crew is not None
        return self._crew

    def gather(self) -> None:
        """Whole again, and with an empty store: everything has to be made."""
        if self._crew is None or self._crew.scheduler.process.poll() is not None:
            self._leave()
            self._count += 1
            root = self._root / f"{self._count}"
            root.mkdir()
            environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
            self._crew = Crew(root, **environment)
        alive = [each for each in self.workers if each.process.poll() is None]
        self.workers = [*alive, *(self.crew.worker() for _ in range(WORKERS - len(alive)))]
        for record in (self.crew.store / "ac").iterdir():
            record.unlink()

    def steps(self) -> list[int]:
        """The processes of steps, on all workers."""
        return [pid for worker in self.workers for pid in steps_of(worker)]

    def close(self) -> None:
        self._leave()
        shutil.rmtree(self._root, ignore_errors=True)

    def _leave(self) -> None:
        if self._crew is not None:
            self._crew.close()
        self._crew, self.workers = None, []


def steps_of(worker: Running) -> list[int]:
    """The processes of steps below a worker. (psutil would look at every process there is.)"""
    return [pid for pid in family(worker.process.pid) if STEP in command_line(pid)]


_company: list[Company] = []


def company_of(world: World) -> Company:
    """The company of this process, at the world's service. Raises Skip."""
    try:
        import distributed  # noqa: F401  (is it there?)
    except ImportError:
        raise Skip("the extra [dask] is not installed") from None
    if not _company:
        _company.append(Company())
        Finalize(None, _company[0].close, exitpriority=1)
    company = _company[0]
    company.gather()
    world.store = company.crew.store
    world.command = (*world.command, "--executor", company.crew.url)
    return company


def until(process: subprocess.Popen[str], holds: Callable[[], object]) -> None:
    """Wait for something, or for the end of the process."""
    while process.poll() is None and not holds():
        wait(process, 0.02)


def in_the_middle(process: subprocess.Popen[str], company: Company, chance: random.Random) -> None:
    """Let a build come to a step, and to somewhere in it or behind it."""
    until(process, company.steps)
    wait(process, chance.uniform(0.0, 3 * LONGEST))


def nothing_runs(company: Company) -> None:
    """The steps of a build that is no more have ended, too."""
    began = time.monotonic()
    while company.steps() and time.monotonic() - began < DEADLINE:
        time.sleep(0.02)
    late = time.monotonic() - began
    expect(late < GONE, f"steps of a dead build ran for {late:.1f} s")


def nothing_lies_around(company: Company, killed: float) -> None:
    """In the store, where workers have their folders: a killed one's goes when the next comes.

    killed: when, as `time.time()`. What a process was writing into the store in that instant may
    lie there until the garbage is collected, a day later; what was written behind it may not lie
    there at all: since then only those write who live.
    """
    temporary = company.crew.store / "tmp"
    places = [each for each in temporary.iterdir() if each.stat().st_mtime > killed]
    tomorrow = time.time() + ABANDONED + 1.0
    collect(Store(str(company.crew.store)), lambda folder: set(), None, None, tomorrow)
    places += temporary.iterdir()
    folders = [*(company.crew.store / "workers").iterdir()]
    for folder in folders:
        places += [each for each in folder.iterdir() if each.name.startswith("qbuild-")]
    expect(not places, f"workers left {[each.name for each in places]}")
    # The folder of a killed qbuild goes when the next connects, and that may have nothing to do.
    expect(len(folders) <= WORKERS + 1, f"the dead left {[each.name for each in folders]}")


@fault(rounds=20)
def sigkill_of_a_dask_worker_in_the_middle_of_a_step(world: World, chance: random.Random) -> None:
    """What it had runs elsewhere, and the build comes to its end without a word to anybody."""
    company = company_of(world)
    if chance.random() < 0.5:
        world.must()
        world.edit_source(chance.choice(sorted(world.words)), "two")
    process = world.start()
    with killed_in_the_end(process):
        in_the_middle(process, company, chance)
        busy = [each for each in company.workers if steps_of(each)]
        chance.choice(busy or company.workers).kill()
        killed = time.time()
        done = world.ended(process)
    expect(done.code == 0, f"exit code {done.code}: {done.out}{done.err}")
    world.recover()
    company.gather()  # whoever comes clears away what the dead one left
    nothing_lies_around(company, killed)


@fault(rounds=20)
def sigkill_of_qbuild_while_dask_workers_run_its_steps(world: World, chance: random.Random) -> None:
    """Nothing of it runs any more soon; the same command goes on where it was."""
    company = company_of(world)
    process = world.start()
    with killed_in_the_end(process):
        if chance.random() < 0.8:
            in_the_middle(process, company, chance)
        else:
            wait(process, chance.uniform(0.0, 1.5))
        process.kill()
        process.wait()
        killed = time.time()
    nothing_runs(company)
    if (world.build / ".qbuild").exists():
        world.nothing_half()
    world.recover()
    nothing_lies_around(company, killed)


@fault(rounds=10)
def sigkill_of_the_dask_scheduler(world: World, chance: random.Random) -> None:
    """An error that says so; its workers go, too, and with another one the same command goes on:
    the journal has all that was finished."""
    company = company_of(world)
    process = world.start()
    with killed_in_the_end(process):
        in_the_middle(process, company, chance)
        workers = company.workers
        company.crew.scheduler.kill()
        done = world.ended(process)
    if done.code != 0:
        expect(done.code == 1, f"exit code {done.code}: {done.err}")
        expect("the scheduler at" in done.err and "is gone" in done.err, done.err)
    for each in workers:
        each.process.wait(DEADLINE)
        expect("is gone; so is this worker" in each.text, each.text)
    world.nothing_half()
    before = company.crew.store
    company.gather()
    world.store = company.crew.store
    world.command = (*world.command[:-1], company.crew.url)
    world.recover()
    left = [each.name for each in (before / "workers").iterdir()]
    expect(not left, f"the dead left {left}")
