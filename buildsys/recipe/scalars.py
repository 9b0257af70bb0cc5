"""What an unquoted word of YAML means: the YAML 1.2 core schema.

YAML 1.1, which PyYAML follows, reads `no` as false, `012` as ten, `1:30` as ninety and
`1e3` as a string. The core schema (YAML 1.2.2, section 10.3) has none of these surprises.
"""

from __future__ import annotations

import math
import re

NULLS = frozenset({"", "~", "null", "Null", "NULL"})
BOOLS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INT = re.compile(r"[-+]?[0-9]+", re.ASCII)
BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII)
MAX_DIGITS = 100


def resolve(word: str) -> bool | int | float | str | None:
    """The value of a plain scalar.

    Raises ValueError for numbers that JSON has no word for (infinities, NaN) and for ones of
    more than 100 digits.
    """
    if word in NULLS:
        return None
    if word in BOOLS:
        return BOOLS[word]
    if word[0] not in "-+.0123456789":
        return word
    if NOT_FINITE.fullmatch(word):
        raise ValueError(f"{word} is not a finite number")
    if BASED.fullmatch(word):
        return int(checked(word), 0)
    if INT.fullmatch(word):
        return int(checked(word))
    if FLOAT.fullmatch(word):
        number = float(checked(word))
        if not math.isfinite(number):
            raise ValueError(f"{word} is not a finite number")
        return number
    return word


def checked(word: str) -> str:
    if len(word) > MAX_DIGITS:
        raise ValueError(f"a number of {len(word)} digits")
    return word
