"""What a step is made from: the parts of its action key, and how two sets of them differ.

Some parts only the plan decides ("fixed": rule, options, names of outputs, threads, declared
environment, device, what the recipe says of its sources). The others are looked up in every
run: code, distributions, inputs, templates, toolchain, and for rules whose sums of floats
decide bytes the class of processor. No part holds an absolute path or a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

if TYPE_CHECKING:
    from buildsys.plan.graph import Json, Plan, Step

MISSING = "(none)"
DIGEST_SIZE = 64  # hexadecimal digits
# Of a hub model the content counts, not the name that it was fetched by.
NOT_OF_CONTENT = frozenset({"hub", "revision"})
# The instruction sets that torch, MKL and oneDNN choose their kernels by.
DISPATCHED = frozenset(
    {"avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
    | {"avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16", "i8mm"}
)


class Reason(NamedTuple):
    """One thing that is not as it was when a step was last made. old and new are JSON values;
    both None where there is nothing to compare."""

    text: str
    old: Json = None
    new: Json = None

    def __str__(self) -> str:
        if self.old is None and self.new is None:
            return self.text
        return f"{self.text}: {show(self.old)} -> {show(self.new)}"


def show(value: Json) -> str:
    """A value on one line; digests shortened."""
    if isinstance(value, str):
        return f"{value[:12]}..." if _is_digest(value) else json.dumps(value)
    return MISSING if value is None else json.dumps(value)


def _is_digest(text: str) -> bool:
    return len(text.removesuffix("+x")) == DIGEST_SIZE and set(text) <= set("0123456789abcdef+x")


def canonical(value: Json) -> str:
    """JSON text that is equal for equal values only (1, 1.0 and true differ)."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def key_digest(parts: Mapping[str, Json]) -> str:
    """The action key: BLAKE3 over the named parts."""
    text = canonical({name: parts[name] for name in sorted(parts)})
    return blake3(text.encode(errors="surrogatepass")).hexdigest()


def device_of(step: Step) -> str:
    """Where the step computes: never anywhere else, so it is part of the key."""
    return "cuda" if step.resources.get("gpu") else "cpu"


def fixed_parts(step: Step, plan: Plan, templates: tuple[str, ...]) -> dict[str, Json]:
    """The parts that the plan decides. templates: options that name a template, whose bytes
    count in place of where it lies."""
    options = {
        name: os.path.basename(str(value)) if name in templates else value
        for name, value in sorted(step.options.items())
    }
    refs = [ref for given in step.inputs.values() for ref in given if ref.kind == "source"]
    names = sorted({ref.name for ref in refs})
    return {
        "rule": step.rule,
        "options": options,
        "outputs": dict(sorted(step.outputs.items())),
        "threads": step.threads,
        "environment": dict(sorted(step.environment.items())),
        "device": device_of(step),
        "sources": {name: _source_part(plan, name) for name in names},
    }


def _source_part(plan: Plan, name: str) -> Json:
    source = plan.sources[name]
    options = {key: value for key, value in source.options.items() if key not in NOT_OF_CONTENT}
    # What a file is (text, zstd, YAML) is told by the end of its name.
    ends = {
        role: os.path.basename(path).partition(".")[2]
        for role, path in source.paths.items()
        if source.kind not in ("model", "folder")
    }
    return {"kind": source.kind, "ends": ends, "options": dict(sorted(options.items()))}


def differences(old: Mapping[str, Json], new: Mapping[str, Json]) -> Iterator[Reason]:
    """What differs between two sets of parts, named as a person would."""
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name), new.get(name)
        if canonical(before) == canonical(after):
            continue
        label = LABELS.get(name, name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences_in(label, before, after)
        elif name in ("code",):
            yield Reason("the code of its rule has changed", before, after)
        else:
            yield Reason(label, before, after)


LABELS = {
    "options": "option",
    "outputs": "output",
    "environment": "environment variable",
    "versions": "version of",
    "inputs": "input",
    "templates": "template of option",
    "sources": "source",
    "isa": "class of processor",
    "toolchain": "toolchain",
}


def _differences_in(
    label: str, old: Mapping[str, Json], new: Mapping[str, Json]
) -> Iterator[Reason]:
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name), new.get(name)
        if canonical(before) == canonical(after) and (name in old) == (name in new):
            continue
        if label == "input" and not before and not after:
            # Without items on either side: an optional input whose artifact is not there.
            yield Reason(f"input '{name}' is {'new' if name in new else 'no longer there'}")
        elif label == "input":
            yield from _input_differences(name, before or [], after or [])
        elif label == "source":
            flat = [{**(each or {}).get("options", {})} for each in (before, after)]
            yield from (
                _differences_in(f"'{name}' option", *flat)
                if flat[0] != flat[1]
                else (Reason(f"source '{name}'", before, after),)
            )
        else:
            yield from _value_differences(f"{label} '{name}'", before, after)


def _value_differences(label: str, old: Json, new: Json) -> Iterator[Reason]:
    """Lists and mappings of the same shape: only the items that differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True), 1):
            if canonical(before) != canonical(after):
                yield from _value_differences(f"{label}, item {number}", before, after)
    elif isinstance(old, dict) and isinstance(new, dict) and list(old) == list(new):
        for key, before in old.items():
            if canonical(before) != canonical(new[key]):
                yield from _value_differences(f"{label}, {key}", before, new[key])
    else:
        yield Reason(label, old, new)


def _input_differences(name: str, old: Json, new: Json) -> Iterator[Reason]:
    before, after = ({entry[0]: entry[1] for entry in each} for each in (old, new))
    changed = [label for label in after if label in before and before[label] != after[label]]
    for label in changed:
        yield Reason(f"input '{name}': content of {label}", before[label], after[label])
    for label in after:
        if label not in before:
            yield Reason(f"input '{name}': {label} is new")
    for label in before:
        if label not in after:
            yield Reason(f"input '{name}': {label} is no longer among them")
    if not changed and before.keys() == after.keys():
        yield Reason(f"input '{name}': order of its items", list(before), list(after))


def processor_class() -> str:
    """The class of machine within which sums of floats come out the same."""
    machine = os.uname().machine
    try:
        with open("/proc/cpuinfo", "rb") as file:
            text = file.read(8192).decode(errors="replace")  # the first processor is enough
    except OSError:
        return machine
    fields = dict(_split(line) for line in text.splitlines() if ":" in line)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    vendor = fields.get("vendor_id") or fields.get("CPU implementer") or ""
    return " ".join([machine, vendor, *sorted(flags & DISPATCHED)])


def _split(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
