"""One build on a cluster: what the engine asks for, in the order in which it asks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from buildsys.engine.dask.address import parse
from buildsys.engine.dask.exchange import Exchange, open_exchange
from buildsys.engine.journal import Entries
from buildsys.engine.key import canonical
from buildsys.engine.project import this_machine
from buildsys.engine.schedule import Capacity, claim_of, machine_capacity
from buildsys.engine.stamps import Stamps
from buildsys.errors import UsageError
from buildsys.gpus import gpu_count
from buildsys.toolchains.definitions import folders_for

if TYPE_CHECKING:
    from buildsys.engine.dask.cluster import Cluster
    from buildsys.engine.dask.offer import Offer
    from buildsys.engine.executor import Executor
    from buildsys.engine.project import Project
    from buildsys.engine.staleness import Machine
    from buildsys.plan.graph import Json

AHEAD = 2  # times what workers can run at once is sent to them
NOTHING = Entries({}, {}, (), 0)


class Session:
    """Connects when something is first asked that only the cluster can answer."""

    def __init__(self, url: str, cache: str | None, forced: tuple[str, ...], memory: int | None):
        """Raises UsageError for a URL that is none, and where there is no place to exchange
        artifacts."""
        self._address = parse(url)
        self._exchange: Exchange = open_exchange(cache)
        self._forced = frozenset(forced)
        self._memory = memory
        self._project: Project | None = None
        self._cluster: Cluster | None = None

    def machine(self, project: Project) -> Machine | None:
        """What of the workers is part of keys; None: what of this machine is."""
        self._project = project
        plan, rules = project.plan, project.blueprint.rules
        asks = any(
            step.toolchain or step.resources.get("gpu") or rules[step.rule].float_sums
            for step in plan.steps.values()
        )
        if not asks or not self._address.scheduler:
            return None
        here = this_machine(plan, project.folder.own("toolchains"))
        return as_workers_have(here, self._connected().offers)

    def capacity(self, jobs: int | None, gpus: int) -> Capacity:
        """Of all workers together, and AHEAD times that: the scheduler there places a step only
        where there is room for it, and a worker that has its next one need not wait for us."""
        one = self.at_once(jobs, gpus)
        if not self._address.scheduler:
            return one
        return one._replace(
            jobs=AHEAD * one.jobs if jobs is None else jobs,
            threads=AHEAD * one.threads,
            memory=AHEAD * one.memory,
            gpus=AHEAD * one.gpus,
            licences={name: AHEAD * count for name, count in one.licences.items()},
        )

    def at_once(self, jobs: int | None, gpus: int) -> Capacity:
        """What all workers together run at a time."""
        if not self._address.scheduler:
            return machine_capacity(jobs, gpus, self._memory)
        offers = list(self._connected().offers.values())
        licences: Counter[str] = Counter()
        for offer in offers:
            licences.update(offer.licences)
        threads = sum(offer.cpus for offer in offers)
        return Capacity(
            jobs=threads if jobs is None else jobs,
            threads=threads,
            memory=sum(offer.memory for offer in offers),
            gpus=sum(offer.gpus for offer in offers),
            licences=dict(licences),
            most=max(offer.memory for offer in offers),
        )

    def follow(self, jobs: int | None, gpus: int, resize: Callable[[Capacity], None]) -> None:
        """Workers come and go: have the capacity told as it is then."""
        cluster = self._connected()
        if cluster.local is None:
            # With none left there is nothing to share out; the executor says so of each step.
            cluster.changed = lambda: resize(self.capacity(jobs, gpus)) if cluster.offers else None

    def executor(self, lock_fd: int) -> Executor:
        """lock_fd: of the build folder; nothing on a worker writes there, so none keeps it."""
        from buildsys.engine.dask.executor import DaskExecutor

        assert self._project is not None
        folder = self._project.folder
        stamps = Stamps(folder.root, folder.own("stamps"))

        lock = threading.Lock()

        def digest(path: str) -> str:
            with lock:
                stamps.expire()  # the same artifact may have been made anew meanwhile
                found = stamps.file(path.removeprefix(f"{folder.root}/"), follow=True)
            assert found is not None  # a regular file; it was looked at a moment ago
            return found

        cluster = self._connected()
        return DaskExecutor(cluster, self._exchange, digest, self._forced)

    def close(self) -> None:
        """For a build that ended before its executor was made."""
        if self._cluster is not None:
            self._cluster.close()

    def _connected(self) -> Cluster:
        if self._cluster is not None:
            return self._cluster
        from buildsys.engine.dask.cluster import Cluster

        address = self._address
        self._cluster = cluster = Cluster(address, self._exchange.store.root)
        try:
            if cluster.local is not None:
                assert self._project is not None
                plan = self._project.plan
                steps = plan.steps.values()
                licences = {each for step in steps for each in claim_of(step, NOTHING).licences}
                capacities = shares(address.workers, self._memory)
                cluster.start_workers(capacities, sorted(licences), folders_for(plan.recipe))
            cluster.wait_for(max(address.workers, 1), address.wait)
            self._refuse_strangers(cluster)
        except BaseException:
            cluster.close()
            raise
        return cluster

    def _refuse_strangers(self, cluster: Cluster) -> None:
        """Raises UsageError where artifacts could not change hands."""
        if self._exchange.url is not None:
            return
        for name, offer in cluster.offers.items():
            if name not in cluster.sharing:
                raise UsageError(
                    f"the worker {offer.name} uses another store ({offer.store}) than this "
                    f"machine ({self._exchange.store.root}), so artifacts cannot change hands",
                    remedy="give --cache URL (a folder that both mount, s3://, http://)",
                )


def shares(workers: int, memory: int | None) -> list[Capacity]:
    """What each worker of `dask://local` gets. GPUs, licences and memory belong to the machine,
    and are counted once, by qbuild itself: each worker may have all that is left."""
    whole = machine_capacity(None, gpu_count(), memory)
    threads = max(whole.threads // workers, 1)
    return [Capacity(threads, threads, whole.memory, whole.gpus)] * workers


def as_workers_have(here: Machine, offers: Mapping[str, Offer]) -> Machine:
    """A machine with the toolchains, GPUs and processors of the workers. Where they differ, one
    is taken: this machine's own if a worker has it too, else the one that most have."""
    names = {*here.toolchains, *here.missing}
    toolchains: dict[str, Json] = {}
    for name in sorted(names):
        each = [found for offer in offers.values() if (found := _fingerprint(name, offer))]
        if each:
            toolchains[name] = agreed(here.toolchains.get(name), each)
    missing = {name: here.missing.get(name, ON_NO_WORKER) for name in names - toolchains.keys()}
    return here._replace(
        toolchains=toolchains,
        missing=missing,
        fields={name: {} for name in toolchains},
        processor=agreed(here.processor, [offer.processor for offer in offers.values()]),
        gpus=max((offer.gpus for offer in offers.values()), default=0),
    )


ON_NO_WORKER = "no worker has it"


def _fingerprint(name: str, offer: Offer) -> Json:
    """None where the worker has not all of it."""
    if "+" not in name:
        return offer.toolchains.get(name)
    parts = {part: offer.toolchains.get(part) for part in name.split("+")}
    return parts if None not in parts.values() else None


def agreed(own: Json, each: list[Json]) -> Json:
    """One of these values, the same in every run."""
    if own in each:
        return own
    counts = Counter(map(canonical, each))
    best = min(counts, key=lambda text: (-counts[text], text))
    return next(value for value in each if canonical(value) == best)


def session_of(
    url: str, cache: str | None, no_cache: bool, forced: tuple[str, ...], memory: int | None
) -> Session:
    """The session that a command line asks for. Raises UsageError."""
    if no_cache:
        raise UsageError(
            f"--executor {url} moves artifacts through the store, and --no-cache forbids it",
            remedy="leave --no-cache away",
        )
    return Session(url, cache, forced, memory)
