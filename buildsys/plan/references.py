"""What the inputs of an artifact refer to: sources, output paths, globs over output paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buildsys.errors import Location, RecipeError
from buildsys.plan.globs import is_glob, matching
from buildsys.plan.graph import Ref
from buildsys.recipe.mistakes import suggestion

if TYPE_CHECKING:
    from buildsys.recipe.recipe import ArtifactEntry, InputEntry, SourceEntry, Wish
    from buildsys.rules.spec import InputSpec, Rule


@dataclass(frozen=True)
class Names:
    """The one namespace of sources and outputs.

    producer: output path -> the artifact that makes it. off: what `when` has switched off.
    """

    sources: Mapping[str, SourceEntry]
    producer: Mapping[str, str]
    off: Mapping[str, Location]

    def everything(self) -> list[str]:
        return [*self.sources, *self.producer]


def resolve_inputs(
    entry: ArtifactEntry, rule: Rule, names: Names
) -> tuple[dict[str, tuple[Ref, ...]], list[RecipeError]]:
    """Every input of an artifact as references, and what is wrong with them."""
    errors: list[RecipeError] = []
    found: dict[str, tuple[Ref, ...]] = {}
    for name, given in entry.inputs.items():
        spec = rule.inputs.get(name)
        refs: dict[str, Ref] = {}
        for wish in given.wishes:
            try:
                refs |= {ref.name: ref for ref in resolve(wish, entry, names)}
            except RecipeError as error:
                errors.append(error)
        if spec is not None:
            errors += list(misfits(name, spec, given, refs, names))
        found[name] = tuple(refs.values())
    for name, spec in rule.inputs.items():
        if spec.required and name not in found:
            errors.append(
                RecipeError(
                    f"'{entry.name}' needs the input '{name}': {spec.doc}",
                    remedy=f"add `{name}: ...` under its `inputs`",
                    location=entry.where,
                )
            )
    return {name: refs for name, refs in found.items() if refs}, errors


def resolve(wish: Wish, entry: ArtifactEntry, names: Names) -> Iterator[Ref]:
    """What one wish refers to. Raises RecipeError for a name that nothing has."""
    if wish.text in names.sources:
        yield Ref("source", wish.text, wish.optional)
    elif wish.text in names.producer:
        yield Ref("artifact", wish.text, wish.optional)
    elif is_glob(wish.text):
        others = (path for path, step in names.producer.items() if step != entry.name)
        paths = matching(wish.text, others)
        if not paths and not wish.optional:
            raise RecipeError(f"no artifact matches '{wish.text}'", location=wish.where)
        yield from (Ref("artifact", path, wish.optional) for path in paths)
    elif wish.text in names.off:
        if not wish.optional:
            raise RecipeError(
                f"'{wish.text}' is switched off by its `when` ({names.off[wish.text]})",
                remedy="write {from: ..., optional: true} if it may be missing",
                location=wish.where,
            )
    else:
        raise RecipeError(
            f"there is no source and no artifact '{wish.text}'",
            remedy=suggestion(wish.text, names.everything(), "there are"),
            location=wish.where,
        )


def misfits(
    name: str, spec: InputSpec, given: InputEntry, refs: Mapping[str, Ref], names: Names
) -> Iterator[RecipeError]:
    """References of a kind that the rule does not take, or too many of them."""
    if len(refs) > 1 and not spec.many:
        yield RecipeError(
            f"input '{name}' takes one thing, and this is {len(refs)}: {', '.join(refs)}",
            location=given.where,
        )
    for ref in refs.values():
        kind = "artifact" if ref.kind == "artifact" else names.sources[ref.name].kind
        # A user may bring an own file or folder wherever a rule takes an artifact.
        stands_in = kind in ("file", "folder") and "artifact" in spec.kinds
        if kind not in spec.kinds and not stands_in:
            wants = " or ".join(dict.fromkeys(KIND_WORDS[each] for each in spec.kinds))
            is_now = "an artifact" if ref.kind == "artifact" else f"a source of kind '{kind}'"
            yield RecipeError(
                f"input '{name}' takes {wants}, and '{ref.name}' is {is_now}",
                location=place_of(given, ref.name),
            )


KIND_WORDS = {
    "artifact": "an artifact",
    "model": "a model",
    "text": "a text source",
    "images": "an images source",
    "file": "a file",
    "folder": "a folder",
}


def place_of(given: InputEntry, name: str) -> Location:
    exact = [wish.where for wish in given.wishes if wish.text == name]
    return exact[0] if exact else given.wishes[0].where
