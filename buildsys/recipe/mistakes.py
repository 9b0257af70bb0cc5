"""Recipe mistakes: the nearest right name, and several mistakes reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from buildsys.errors import Location, RecipeError, explain


class RecipeMistakes(RecipeError):
    """All mistakes that one stage found; it reads as the list of them, in file order."""

    def __init__(self, errors: Sequence[RecipeError]) -> None:
        first = errors[0]
        super().__init__(first.message, remedy=first.remedy, location=first.location)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(explain(error) for error in self.errors)


def raise_all(errors: Iterable[RecipeError]) -> None:
    """Raise what was collected: nothing, the one error, or all of them in file order.

    A mistake inside a matrix is found once per instance; it is reported once.
    """
    unique = {(error.location, error.message): error for error in errors}
    found = sorted(unique.values(), key=lambda error: (error.location or Location("", 0, 0))[:3])
    if len(found) == 1:
        raise found[0]
    if found:
        raise RecipeMistakes(found)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` was most likely meant to be, or None."""
    from difflib import get_close_matches

    known = list(names)
    by_case = {name.casefold(): name for name in known}
    if word.casefold() in by_case:
        return by_case[word.casefold()]
    found = get_close_matches(word, known, n=1, cutoff=0.6)
    return found[0] if found else None


def suggestion(word: str, names: Iterable[str], what: str = "") -> str | None:
    """A remedy: "did you mean 'x'?", else the list of what there is, else None."""
    known = sorted(set(names))
    near = nearest(word, known)
    if near is not None:
        return f"did you mean '{near}'?"
    if not known:
        return None
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"{what or 'known names'}: {shown}"
