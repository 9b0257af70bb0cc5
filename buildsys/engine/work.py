"""Steps in flight: from an order to a committed journal line, or to a failure.

A step runs in the executor; its outputs are digested (in a thread where they are large:
BLAKE3 leaves Python alone meanwhile), wait for their group, and are committed. Everything but
the digesting happens in the one thread that calls `wait`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from buildsys.engine import staging as stage
from buildsys.engine.commit import Finished
from buildsys.engine.disk import shortage
from buildsys.engine.executor import Ended, Progress
from buildsys.engine.failure import Failure
from buildsys.engine.keeping import forget_kept, trust_kept
from buildsys.engine.key import key_digest
from buildsys.engine.last_run import LeftBefore, keep_failure
from buildsys.engine.ordering import make_order
from buildsys.engine.witness import Witness
from buildsys.errors import QbuildError
from buildsys.store.placing import fsync

if TYPE_CHECKING:
    from buildsys.engine.commit import Committer
    from buildsys.engine.display import Display
    from buildsys.engine.executor import Executor
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.key import Reason
    from buildsys.engine.schedule import Claim
    from buildsys.engine.staleness import Machine, Survey
    from buildsys.engine.storing import Lookup, StepCache
    from buildsys.plan.graph import Json, Step

LARGE = 32 << 20  # bytes of output from which on digesting is left to a thread
POLL = 0.2  # seconds; how soon a signal is noticed
POLL_DIGESTING = 0.005


class Running(NamedTuple):
    """A step in the executor. parts: of its key as it was started, and their digest; lookups: of
    those that neither plan nor inputs decide; claim, priority: see `executor.Order`."""

    step: Step
    staging: str
    parts: Mapping[str, Json]
    key: str
    lookups: str
    reasons: tuple[Reason, ...]
    claim: Claim | None = None
    priority: float = 0.0


class Work:
    """Invariant: a step that was started is in exactly one of: the lookups, the executor, the
    thread (restored or digested), the commit group; or its outcome was returned by `wait`."""

    def __init__(
        self,
        folder: BuildFolder,
        survey: Survey,
        machine: Machine,
        committer: Committer,
        executor: Executor,
        display: Display,
        ended: Callable[[str], None],
        cache: StepCache | None = None,
    ) -> None:
        """ended: told when the last process of a step is gone, long before its outcome."""
        self._ended = ended
        self._folder = folder
        self._survey = survey
        self._machine = machine
        self._executor = executor
        self._display = display
        self._staging = stage.Staging(folder.own("staging"))
        self._left = LeftBefore(folder)
        self._committer = committer
        self._cache = cache
        self._witness = Witness(survey.blueprint, survey.stamps, machine.template)
        self._looking: dict[str, tuple[Running, Lookup]] = {}
        self._restoring: dict[str, tuple[Running, Future[Finished | None]]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._running: dict[str, Running] = {}
        self._digesting: dict[str, tuple[Ended, Future[Finished]]] = {}
        self._in_flight: dict[str, Running] = {}
        self.failures: list[Failure] = []

    def start(
        self,
        name: str,
        reasons: tuple[Reason, ...],
        claim: Claim | None = None,
        priority: float = 0.0,
    ) -> bool:
        """Hand a step to the executor; everything that it reads is in place. False where that
        fails already."""
        step = self._survey.plan.steps[name]
        parts = self._survey.parts(step)
        staging = self._staging.fresh(step.outputs.values())
        key, lookups = key_digest(parts), self._survey.lookups(step)
        running = Running(step, staging, parts, key, lookups, reasons, claim, priority)
        self._left.forget(name)
        self._display.started(name, "; ".join(map(str, reasons)))
        cache = self._cache
        lookup = None if cache is None else cache.look_up(name, key)
        return self._submit(running) if lookup is None else self._look(running, lookup)

    def look_ahead(self, name: str) -> None:
        """A step is ready and waits for its turn; everything that it reads is in place."""
        if self._cache is not None and self._cache.looks_ahead:
            parts = self._survey.parts(self._survey.plan.steps[name])
            self._cache.look_ahead(name, key_digest(parts))

    def _submit(self, running: Running) -> bool:
        """Hand a step to the executor. False where that fails already."""
        step = running.step
        facts = self._survey.blueprint.rules[step.rule]
        self._witness.begins(step)
        if facts.resumable:
            trust_kept(self._folder, step.name, self._witness.stamps_of(step))
        try:
            order = make_order(
                step,
                self._survey.plan,
                facts,
                self._folder,
                running.staging,
                running.parts,
                self._machine.template,
                self._machine.fields.get(step.toolchain or ""),
                running.claim,
                running.priority,
                self._executor.elsewhere,
            )
        except QbuildError as error:
            self._fail(running, str(error), None)
            return False
        self._running[step.name] = running
        self._executor.submit(order)
        return True

    @property
    def root(self) -> str:
        """The build folder."""
        return self._folder.root

    @property
    def busy(self) -> bool:
        """Does anything remain whose outcome `wait` has not returned?"""
        return self._begun or self._committer.due() is not None

    @property
    def _begun(self) -> bool:
        return bool(self._looking or self._running or self._restoring or self._digesting)

    def wait(self) -> list[tuple[str, bool]]:
        """Outcomes since the last call: (step, was it made). Waits a moment for the first.

        Whatever could start was started before: if nothing runs now, there is no sense in
        waiting for more steps to commit together.
        """
        outcomes = self._take_lookups() if self._cache is not None else []
        idle = not self._begun
        if not idle:
            outcomes += [*self._take_events(), *self._take_digests()]
        due = self._committer.due()
        if due is not None and (due <= 0 or idle):
            outcomes += self._commit()
        return outcomes

    def ended_only(self) -> list[tuple[str, bool]]:
        """After the executor was closed: commit what had ended, forget what had not."""
        for unfinished in (self._looking, self._running, self._restoring):
            unfinished.clear()
        outcomes: list[tuple[str, bool]] = []
        while self._digesting:
            outcomes += self._take_digests(POLL)
        if self._committer.due() is not None:
            outcomes += self._commit()
        return outcomes

    def close(self) -> None:
        """Nothing runs any more: leave no staging folder."""
        self._thread.shutdown(cancel_futures=True)
        self._staging.close()

    def _look(self, running: Running, lookup: Lookup) -> bool:
        """Restore a step if it is found at once, run it if nothing is, and wait otherwise. False
        where it fails already."""
        assert self._cache is not None  # it made the lookup
        if not self._cache.is_settled(lookup):
            self._looking[running.step.name] = (running, lookup)
            return True
        action = self._cache.found(lookup)
        if action is None:
            return self._submit(running)
        work = partial(self._cache.restore, lookup, action, running, self._finish)
        if action.size < LARGE:
            return self._take_restored(running, work())
        self._restoring[running.step.name] = (running, self._thread.submit(work))
        return True

    def _take_lookups(self) -> list[tuple[str, bool]]:
        failed = []
        for name, (running, lookup) in list(self._looking.items()):
            del self._looking[name]
            if not self._look(running, lookup):
                failed.append((name, False))
        for name, (running, future) in list(self._restoring.items()):
            if future.done():
                del self._restoring[name]
                if not self._take_restored(running, future.result()):
                    failed.append((name, False))
        for name, _ in failed:
            self._ended(name)
        return failed

    def _take_restored(self, running: Running, finished: Finished | None) -> bool:
        """A restored step waits for its group; one that could not be restored runs after all."""
        name = running.step.name
        if finished is None:
            self._staging.discard(running.staging)
            staging = self._staging.fresh(running.step.outputs.values())
            return self._submit(running._replace(staging=staging))
        for warning in finished.record["warnings"]:
            self._display.say(f"{name}: warning: {warning}")
        self._in_flight[name] = running
        self._committer.add(finished)
        self._ended(name)
        return True

    def _take_events(self) -> list[tuple[str, bool]]:
        due = self._committer.due()
        elsewhere = bool(self._looking or self._restoring or self._digesting)
        timeout = POLL_DIGESTING if elsewhere else min(POLL, POLL if due is None else due)
        if elsewhere and not self._running:
            time.sleep(timeout)
        failed = []
        for event in self._executor.poll(timeout if self._running else 0.0):
            if isinstance(event, Progress):
                self._display.progress(event.id, event.done, event.total, event.unit)
            elif isinstance(event, Ended):
                running = self._running.pop(event.id)
                self._ended(event.id)
                if not self._has_ended(running, event):
                    failed.append((event.id, False))
        return failed

    def _has_ended(self, running: Running, ended: Ended) -> bool:
        """A step's processes are gone; False where it failed."""
        name = running.step.name
        for warning in ended.warnings:
            self._display.say(f"{name}: warning: {warning}")
        if ended.code != 0:
            self._fail(running, ended.error, ended)
            return False
        try:
            outputs = stage.collect(running.staging, running.step.outputs.values())
        except stage.UnfitOutput as error:
            self._fail(running, str(error), ended)
            return False
        self._in_flight[name] = running
        if sum(output.size for output in outputs) < LARGE:
            self._committer.add(self._finish(running, ended, outputs))
        else:
            future = self._thread.submit(self._finish, running, ended, outputs, sync=True)
            self._digesting[name] = (ended, future)
        return True

    def _take_digests(self, wait: float = 0.0) -> list[tuple[str, bool]]:
        failed = []
        for name, (ended, future) in list(self._digesting.items()):
            if wait and not future.done():
                time.sleep(POLL_DIGESTING)
            if not future.done():
                continue
            del self._digesting[name]
            try:
                self._committer.add(future.result())
            except OSError as error:
                self._fail(self._in_flight.pop(name), f"its outputs: {error}", ended)
                failed.append((name, False))
        return failed

    def _finish(
        self,
        running: Running,
        ended: Ended,
        outputs: Sequence[stage.Output],
        sync: bool = False,
        restored: Mapping[str, str] | None = None,
        origin: str = "",
    ) -> Finished:
        """Digest the outputs. Runs in a thread where they are large; touches no shared state.

        restored: the digests of files that come from the store, by path; origin: which.
        """
        hash_one = self._survey.hash_one if restored is None else restored.__getitem__
        digests: dict[str, str] = {}
        for output in outputs:
            digests |= stage.digest_output(output, hash_one)
            for path in (*output.files, *output.folders) if sync else ():
                fsync(path)
        name = running.step.name
        record = {
            "kind": "done",
            "step": name,
            **made_from(running, self._survey.blueprint.fixed[name]),
            "outputs": {output.path: digests[output.path] for output in outputs},
            "sizes": {output.path: output.size for output in outputs},
            "wall": round(ended.wall, 4),
            "cpu": round(ended.cpu, 4),
            "memory": ended.peak_memory,
            "notes": dict(ended.notes),
            "warnings": list(ended.warnings),
            "at": round(time.time(), 3),
        }
        if origin:
            record["restored"] = origin
        return Finished(name, running.staging, tuple(outputs), digests, record)

    def _commit(self) -> list[tuple[str, bool]]:
        self._survey.expire()
        self._witness.expire()
        done, refused = self._committer.commit(self._changed)
        for finished in done:
            self._staging.discard(self._in_flight.pop(finished.step).staging)
            self._survey.built(finished.step, finished.record)
            forget_kept(self._folder, finished.step)
            record = finished.record
            if self._cache is not None:
                self._cache.keep(finished)
            self._display.committed(finished.step, record)
            if "restored" in record:
                self._display.restored(finished.step, record["restored"])
            else:
                self._display.ended(finished.step, False, record["wall"], record["memory"])
        for finished, why in refused:
            running = self._in_flight.pop(finished.step)
            # What it kept to go on from was made of what it read, too.
            forget_kept(self._folder, finished.step)
            self._fail(running, why, None)
        return [(each.step, True) for each in done] + [(each.step, False) for each, _ in refused]

    def _changed(self, name: str) -> Sequence[Reason]:
        running = self._in_flight[name]
        changed = self._survey.changed_since(running.step, running.parts)
        return changed or self._witness.moved(running.step)

    def _fail(self, running: Running, error: str, ended: Ended | None) -> None:
        name = running.step.name
        wanting = shortage(running.staging)  # before room is made
        error = f"{error}\n{wanting}" if wanting else error
        self._staging.discard(running.staging)
        failure = Failure(name, error, ended, self._folder.log(name))
        self.failures.append(failure)
        keep_failure(self._folder, failure)
        self._display.failed(failure)
        wall, memory = (ended.wall, ended.peak_memory) if ended is not None else (0.0, 0)
        self._display.ended(name, True, wall, memory)
        self._display.say(str(failure))


def made_from(running: Running, fixed: str) -> dict[str, Json]:
    """The part of a journal line that says what a step was made from, and why. fixed: digest of
    what only the plan decides."""
    return {
        "key": running.key,
        "fixed": fixed,
        "lookups": running.lookups,
        "inputs": running.parts["inputs"],
        "parts": {name: value for name, value in running.parts.items() if name != "inputs"},
        "why": [str(reason) for reason in running.reasons],
    }
