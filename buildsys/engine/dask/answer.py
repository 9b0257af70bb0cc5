"""What a worker says of a parcel, when it is done with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, NamedTuple

from buildsys.engine.executor import Ended

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


class Answer(NamedTuple):
    """kind: "ended" (made, or failed; `ended` says how); "refused" (this worker cannot make what
    the key says, `why`); "missing" (inputs with these places are not in the exchange).
    log: what the step printed. worker: for people."""

    kind: Literal["ended", "refused", "missing"]
    worker: str
    ended: Ended | None = None
    log: str = ""
    why: str = ""
    places: tuple[str, ...] = ()


def encode(answer: Answer) -> str:
    found: dict[str, Json] = answer._asdict()
    found["ended"] = None if answer.ended is None else list(answer.ended)
    return json.dumps(found)


def decode(text: str) -> Answer:
    found = Answer(**json.loads(text))
    ended = None
    if found.ended is not None:
        ended = Ended(*found.ended)
        ended = ended._replace(warnings=tuple(ended.warnings))
    return found._replace(ended=ended, places=tuple(found.places))
