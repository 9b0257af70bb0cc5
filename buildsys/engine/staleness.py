"""Is a step stale, and why: the one place where that is decided.

A null build, `status`, `why`, `-n` and the runner all ask `Survey.judge`. A step is

    fresh     its outputs are what its key promises
    stale     it must run; the reasons say what differs
    unsure    something that it reads is going to be made anew: only then can it be told
    skipped   its toolchain is missing, or that of something it needs
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from buildsys.engine.digest import UnfitContent, artifact_digest, source_entries
from buildsys.engine.journal import Entries, Line
from buildsys.engine.key import Reason, differences, fixed_parts, key_digest
from buildsys.identity import normal_name

if TYPE_CHECKING:
    from buildsys.engine.blueprint import Blueprint, RuleFacts
    from buildsys.engine.code import RuleCode
    from buildsys.engine.stamps import Stamps
    from buildsys.plan.graph import Json, Ref, Step

State = Literal["fresh", "stale", "unsure", "skipped"]


class Verdict(NamedTuple):
    """absent: a temporary artifact that is fresh by its key and was removed after use."""

    state: State
    reasons: tuple[Reason, ...] = ()
    absent: bool = False


class Machine(NamedTuple):
    """What of this machine is part of keys. versions: of installed distributions.
    toolchains: those that are found, name -> fingerprint. gpus: how many there are.
    template: name -> path of the file. missing: toolchains that are not found, name -> why,
    and what to do. fields: those that are found, name -> what a step is told of them."""

    versions: Callable[[], Mapping[str, str]]
    toolchains: Mapping[str, Json]
    processor: str
    gpus: int
    template: Callable[[str], str]
    missing: Mapping[str, str] = {}
    fields: Mapping[str, Mapping[str, str]] = {}


FRESH = Verdict("fresh")
ADOPTED = "adopted"  # in place of what was looked up on the machine that made it


class Survey:
    """The state of every step that was judged, in the plan's order.

    Invariant: `digests` holds the outputs of exactly the steps that are fresh (skipped ones:
    None); what is not in it has to be made first.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        entries: Entries,
        stamps: Stamps,
        code: RuleCode,
        machine: Machine,
        forced: Collection[str] = (),
    ) -> None:
        self.blueprint = blueprint
        self.plan = blueprint.plan
        self.entries = entries
        self.verdicts: dict[str, Verdict] = {}
        self.digests: dict[str, str | None] = {}
        self._stamps = stamps
        self._code = code
        self._machine = machine
        self._forced = set(forced)
        self._sources: dict[tuple[str, tuple[str, ...]], list[list[str | None]]] = {}
        self._looked_up: dict[str, tuple[dict[str, Json], str]] = {}
        self._versions: Mapping[str, str] | None = None

    @property
    def stamps(self) -> Stamps:
        return self._stamps

    @property
    def hash_one(self) -> Callable[[str], str]:
        """What digests a file."""
        return self._stamps.hash_one

    def judge(self, name: str) -> Verdict:
        """Decide about one step; what it reads must have been judged before.

        Raises RecipeError for a source that is not there.
        """
        step = self.plan.steps[name]
        verdict = self._decide(step)
        self.verdicts[name] = verdict
        for path in step.outputs.values():
            if verdict.state == "fresh":
                self.digests[path] = self.entries.done[name]["outputs"][path]
            elif verdict.state == "skipped":
                self.digests[path] = None
            else:
                self.digests.pop(path, None)
        return verdict

    def known(self, name: str, outputs: Mapping[str, str]) -> None:
        """A step that is fresh, as something other than the journal tells. outputs: digests."""
        self.verdicts[name] = FRESH
        self.digests.update(outputs)

    def built(self, name: str, record: Mapping[str, Json]) -> None:
        """A step was made and committed: what the journal now says of it."""
        self.entries.done[name] = Line(record)
        self.entries.open.pop(name, None)
        self._forced.discard(name)
        self.verdicts[name] = FRESH
        self.digests.update(record["outputs"])

    def expire(self) -> None:
        """Look at everything anew from here on: files may have changed."""
        self._stamps.expire()
        self._code.expire()
        self._sources.clear()
        self._looked_up.clear()
        self._versions = None

    def parts(self, step: Step) -> dict[str, Json]:
        """All parts of the step's key as they are now; everything it reads must be settled."""
        facts = self.blueprint.rules[step.rule]
        fixed = fixed_parts(step, self.plan, facts.templates)
        inputs, _ = self._inputs(step, facts)
        return {**fixed, "inputs": inputs, **self._lookups(step, facts)[0]}

    def lookups(self, step: Step) -> str:
        """The digest of those parts that neither plan nor inputs decide, as they are now."""
        return self._lookups(step, self.blueprint.rules[step.rule])[1]

    def looked_up(self, step: Step) -> Json:
        """What neither plan nor journal say of a step: the digest of its lookups and the sources
        that it reads; or why it cannot be made here."""
        missing = self._why_unable(step)
        if missing is not None:
            return str(missing)
        facts = self.blueprint.rules[step.rule]
        sources = {
            f"{given} {ref.name}": self._source(ref.name, facts.parts.get(given, ()))
            for given, refs in step.inputs.items()
            for ref in refs
            if ref.kind == "source"
        }
        return [self._lookups(step, facts)[1], sources]

    def changed_since(self, step: Step, parts: Mapping[str, Json]) -> list[Reason]:
        """What of the parts that a step ran with is no longer so (see `expire`)."""
        facts = self.blueprint.rules[step.rule]
        now = {"inputs": self._inputs(step, facts)[0], **self._lookups(step, facts)[0]}
        before = {name: parts[name] for name in now}  # the rest only the plan decides
        # A toolchain's fingerprint may hold numbers, and 1 == True.
        same = before == now and step.toolchain is None
        changed = [] if same else list(differences(before, now))
        for given in step.inputs.values():
            for ref in given:
                promised = self.digests.get(ref.name)
                if ref.kind == "artifact" and promised is not None:
                    changed += self.output_reasons(ref.name, promised)
        return changed

    def _decide(self, step: Step) -> Verdict:
        no_longer: tuple[Reason, ...] = ()
        if self._is_adopted(step):
            # Made elsewhere: as long as it is fresh, nobody needs to be able to make it here.
            verdict = self._compared(step)
            if verdict.state == "fresh":
                return verdict
            no_longer = verdict.reasons
        missing = self._why_skipped(step)
        if missing is not None:
            return Verdict("skipped", (missing, *no_longer))
        return self._compared(step)

    def _compared(self, step: Step) -> Verdict:
        """With what the journal says of it; whether it can be made here does not count."""
        reasons = self._reasons(step)
        if reasons:
            return Verdict("stale", tuple(reasons))
        pending = self._pending(step)
        if pending:
            return Verdict("unsure", tuple(pending))
        wrong = self._wrong_outputs(step)
        if not wrong:
            return FRESH
        return Verdict("fresh", (), absent=True) if step.temporary else Verdict("stale", wrong)

    def why_missing(self, step: str) -> str | None:
        """What was looked for in vain for a step of its own toolchain, and how to get it."""
        return self._machine.missing.get(self.plan.steps[step].toolchain or "")

    def _why_unable(self, step: Step) -> Reason | None:
        """What this machine lacks for a step."""
        if step.toolchain is not None and step.toolchain not in self._machine.toolchains:
            return Reason(f"toolchain '{step.toolchain}' is not installed")
        wanted = int(step.resources.get("gpu") or 0)
        if wanted > self._machine.gpus:
            return Reason(f"it needs {wanted} GPU, and there are {self._machine.gpus} here")
        return None

    def _why_skipped(self, step: Step) -> Reason | None:
        unable = self._why_unable(step)
        if unable is not None:
            return unable
        for given in step.inputs.values():
            for ref in given:
                if ref.kind == "source" or ref.optional:
                    continue
                maker = self.verdicts.get(self.plan.producer[ref.name])
                if maker is not None and maker.state == "skipped":
                    return Reason(f"needs {ref.name}: {maker.reasons[0].text}")
        return None

    def is_skipped_for_others(self, name: str) -> bool:
        """Skipped, and not for want of what it needs itself: then nothing was looked up."""
        skipped = self.verdicts[name].state == "skipped"
        return skipped and self._why_unable(self.plan.steps[name]) is None

    def is_as_recorded(self, name: str) -> bool:
        """Would `looked_up`, of a step that was judged, tell of any change since? Not where a
        fresh artifact was adopted and cannot be made here: then its sources are not looked up."""
        step = self.plan.steps[name]
        if self.verdicts[name].state != "fresh":
            return True
        return self._why_unable(step) is None and not self._reasons(step)

    def _is_adopted(self, step: Step) -> bool:
        """Whether it was made elsewhere, and is to stay: what this machine has does not count."""
        record = self.entries.done.get(step.name)
        return record is not None and record["lookups"] == ADOPTED and step.name not in self._forced

    def adopted(self, step: Step) -> dict[str, Json]:
        """What a journal line says of a step's making, for outputs that were made elsewhere."""
        facts = self.blueprint.rules[step.rule]
        parts = {**fixed_parts(step, self.plan, facts.templates), "toolchain": ADOPTED}
        inputs, _ = self._inputs(step, facts)
        return {
            "key": key_digest({**parts, "inputs": inputs}),
            "fixed": self.blueprint.fixed[step.name],
            "lookups": ADOPTED,
            "inputs": inputs,
            "parts": parts,
            "why": ["adopted"],
        }

    def _reasons(self, step: Step) -> list[Reason]:
        """Why the step must run, whatever becomes of what it reads."""
        if step.name in self._forced:
            return [Reason("forced by --force")]
        if step.name in self.entries.open:
            return [Reason("putting its outputs in place was interrupted")]
        record = self.entries.done.get(step.name)
        if record is None:
            return [Reason("never built")]
        facts = self.blueprint.rules[step.rule]
        reasons: list[Reason] = []
        if record["fixed"] != self.blueprint.fixed[step.name]:
            reasons += _differences(record, fixed_parts(step, self.plan, facts.templates))
        if not self._is_adopted(step):
            looked_up, digest = self._lookups(step, facts)
            if record["lookups"] != digest:
                reasons += _differences(record, looked_up)
        inputs, complete = self._inputs(step, facts)
        if record["inputs"] != inputs:
            before = record["inputs"]
            known = before if complete else self._without_unsettled(step, before)
            reasons += differences({"inputs": known}, {"inputs": inputs})
        return reasons

    def _pending(self, step: Step) -> list[Reason]:
        """Inputs whose content is not known before they are made."""
        return [
            Reason(f"reads {ref.name}, which is to be made")
            for given in step.inputs.values()
            for ref in given
            if self._is_unsettled(ref)
        ]

    def _is_unsettled(self, ref: Ref) -> bool:
        return ref.kind == "artifact" and ref.name not in self.digests

    def _wrong_outputs(self, step: Step) -> tuple[Reason, ...]:
        promised = self.entries.done[step.name]["outputs"]
        return tuple(
            reason
            for path in step.outputs.values()
            for reason in self.output_reasons(path, promised[path])
        )

    def output_reasons(self, path: str, promised: str | None) -> list[Reason]:
        """Why an output is not the one that was promised (None: none should be there)."""
        try:
            found = artifact_digest(self._stamps, path)
        except UnfitContent as error:
            return [Reason(f"{path} was changed by hand: {error.message}")]
        if found == promised:
            return []
        if found is None:
            return [Reason(f"{path} is missing")]
        return [Reason(f"{path} was changed by hand", promised, found)]

    def _inputs(self, step: Step, facts: RuleFacts) -> tuple[dict[str, Json], bool]:
        """Each input's items as [label, digest], unsettled ones left out; were all settled?"""
        complete = True
        found: dict[str, Json] = {}
        for name, given in step.inputs.items():
            items: list[list[str | None]] = []
            for ref in given:
                if ref.kind == "source":
                    items += self._source(ref.name, facts.parts.get(name, ()))
                elif ref.name in self.digests:
                    items.append([ref.name, self.digests[ref.name]])
                else:
                    complete = False
            found[name] = items
        return found, complete

    def _without_unsettled(self, step: Step, inputs: Mapping[str, Json]) -> dict[str, Json]:
        """Recorded inputs, without the items that only making them will tell."""
        unsettled = {
            ref.name for given in step.inputs.values() for ref in given if self._is_unsettled(ref)
        }
        return {
            name: [item for item in items if item[0] not in unsettled]
            for name, items in inputs.items()
        }

    def _source(self, name: str, parts: tuple[str, ...]) -> list[list[str | None]]:
        if (name, parts) not in self._sources:
            source = self.plan.sources[name]
            self._sources[name, parts] = source_entries(self._stamps, source, parts)
        return self._sources[name, parts]

    def _lookups(self, step: Step, facts: RuleFacts) -> tuple[dict[str, Json], str]:
        """The parts that neither plan nor inputs decide, and their digest; the same for all
        steps of a rule but for templates and toolchains."""
        if step.rule not in self._looked_up:
            parts = self._rule_lookups(facts)
            self._looked_up[step.rule] = (parts, key_digest(parts))
        found = self._looked_up[step.rule]
        if not facts.templates and step.toolchain is None:
            return found
        parts = {**found[0], **self._step_lookups(step, facts)}
        return parts, key_digest(parts)

    def _rule_lookups(self, facts: RuleFacts) -> dict[str, Json]:
        if self._versions is None:
            self._versions = self._machine.versions()
        names = [normal_name(name) for name in facts.distributions]
        return {
            "code": self._code.digest(facts.module),
            "versions": {name: self._versions.get(name) for name in names},
            "templates": {},
            "toolchain": {},
            "isa": self._machine.processor if facts.float_sums else None,
        }

    def _step_lookups(self, step: Step, facts: RuleFacts) -> dict[str, Json]:
        templates = {}
        for option in facts.templates:
            path = self._machine.template(str(step.options[option]))
            templates[option] = self._stamps.file(path, follow=True)
        name = step.toolchain
        fingerprint = {} if name is None else {name: self._machine.toolchains[name]}
        return {"templates": templates, "toolchain": fingerprint}


def _differences(record: Mapping[str, Json], new: Mapping[str, Json]) -> list[Reason]:
    old = record["parts"]
    return list(differences({name: old.get(name) for name in new}, new))


def skipped(survey: Survey) -> list[str]:
    """A line for each skipped step, with the chain that leads to what is missing."""
    return [
        f"skipped {name}: {verdict.reasons[0]}"
        for name, verdict in survey.verdicts.items()
        if verdict.state == "skipped"
    ]
