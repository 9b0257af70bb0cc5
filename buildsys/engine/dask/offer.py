"""What a worker has, as it publishes it; and what a step needs, in the same words.

Dask places tasks by "resources": names with amounts. Every need of a step becomes one, so that
no step of ours ever gets to a worker that is not ours: `qbuild worker` alone has them.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from buildsys.engine.key import canonical, processor_class
from buildsys.engine.schedule import Capacity

if TYPE_CHECKING:
    from buildsys.engine.executor import Order
    from buildsys.plan.graph import Json

PRESENT = 1e6  # of what is there or not, and is not used up
CPU, MEMORY, GPU = "qbuild cpu", "qbuild memory", "qbuild gpu"
GIB = 1 << 30


class Offer(NamedTuple):
    """machine: the running kernel's id: processes with the same one share files and memory.
    system: operating system and architecture; licences: name -> how many at a time;
    toolchains: name -> fingerprint; store: root of the worker's local store."""

    host: str
    pid: int
    machine: str
    system: str
    python: str
    processor: str
    cpus: int
    memory: int
    gpus: int
    licences: Mapping[str, int]
    toolchains: Mapping[str, Json]
    store: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host} (pid {self.pid})"


def offer_here(
    capacity: Capacity, licences: Mapping[str, int], toolchains: Mapping[str, Json], store: str
) -> Offer:
    """What this process offers."""
    return Offer(
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=machine_id(),
        system=system(),
        python=platform.python_version(),
        processor=processor_class(),
        cpus=capacity.threads,
        memory=capacity.memory,
        gpus=capacity.gpus,
        licences=dict(licences),
        toolchains=dict(toolchains),
        store=store,
    )


def machine_id() -> str:
    """Equal for processes under one running kernel."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def system() -> str:
    return f"{sys.platform} {os.uname().machine}"


def resources_of(offer: Offer) -> dict[str, float]:
    """The Dask resources of a worker."""
    found = {CPU: float(offer.cpus), MEMORY: float(offer.memory), GPU: float(offer.gpus)}
    found |= {_licence(name): float(count) for name, count in offer.licences.items()}
    traits = [_trait("system", offer.system), _trait("processor", offer.processor)]
    traits += [_trait(f"toolchain {name}", told) for name, told in offer.toolchains.items()]
    return found | dict.fromkeys(traits, PRESENT)


def needs_of(order: Order) -> dict[str, float]:
    """The Dask resources that a step takes."""
    claim = order.claim
    assert claim is not None  # an order for elsewhere has all its fields
    found = {CPU: float(claim.threads), MEMORY: float(claim.memory), GPU: float(claim.gpus)}
    found |= {_licence(name): 1.0 for name in claim.licences}
    traits = [_trait("system", system())]
    if order.parts["isa"] is not None:
        traits.append(_trait("processor", order.parts["isa"]))
    for name, told in order.parts["toolchain"].items():
        traits += [_trait(f"toolchain {part}", each) for part, each in _single(name, told)]
    return {name: amount for name, amount in found.items() if amount} | dict.fromkeys(traits, 1.0)


def cut_to_fit(needs: Mapping[str, float], offers: Mapping[str, Offer]) -> dict[str, float]:
    """A claim of processors or memory that is larger than every worker takes all of the largest,
    as it would run alone on a machine of its own."""
    fit = [offer for offer in offers.values() if not lacking(needs, offer, amounts=False)]
    most = {
        CPU: max((float(offer.cpus) for offer in fit), default=0.0),
        MEMORY: max((float(offer.memory) for offer in fit), default=0.0),
    }
    return {name: min(amount, most.get(name, amount)) for name, amount in needs.items()}


def lacking(needs: Mapping[str, float], offer: Offer, *, amounts: bool = True) -> list[str]:
    """What a worker has not, or has too little of; amounts: processors and memory count too."""
    has = resources_of(offer)
    return [
        name
        for name, amount in needs.items()
        if (amounts or name not in (CPU, MEMORY)) and has.get(name, 0.0) < amount
    ]


def in_words(need: str, amount: float, offer: Offer) -> str:
    """One thing that a worker lacks, for people."""
    word = need.removeprefix("qbuild ").rpartition(" #")[0] or need.removeprefix("qbuild ")
    if need == MEMORY:
        return f"{amount / GIB:.1f} GiB of memory (it has {offer.memory / GIB:.1f})"
    if need in (CPU, GPU):
        return f"{amount:g} {word} (it has {resources_of(offer)[need]:g})"
    if word.startswith("toolchain "):
        name = word.removeprefix("toolchain ")
        where = "another version is there" if name in offer.toolchains else "it is not there"
        return f"toolchain '{name}' ({where})"
    if word == "processor":
        return "a processor of the class that the step's key says"
    return word


def _single(name: str, told: Json) -> list[tuple[str, Json]]:
    """`a+b` is published as a and b."""
    return list(told.items()) if "+" in name and isinstance(told, dict) else [(name, told)]


def _licence(name: str) -> str:
    return f"qbuild licence {name}"


def _trait(what: str, told: Json) -> str:
    return f"qbuild {what} #{blake3(canonical(told).encode()).hexdigest(8)}"
