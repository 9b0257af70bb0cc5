"""JSON Schemas (draft 2020-12) of what qbuild prints for programs: `qbuild schema --of NAME`.

Keys are never removed or given another meaning within a version; more may come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 0}
SECONDS: Json = {"type": "number", "minimum": 0, "description": "seconds"}
BYTES: Json = {"type": "integer", "minimum": 0, "description": "bytes"}
TIME: Json = {"type": "number", "description": "seconds since the epoch"}
TEXTS: Json = {"type": "array", "items": TEXT}
DIGEST: Json = {"type": "string", "description": "BLAKE3; +x after it for an executable"}
STATES = ("fresh", "stale", "unsure", "skipped")


def maybe(schema: Json) -> Json:
    """That, or null: nobody knows, or there is none."""
    return {"anyOf": [schema, {"type": "null"}]}


def form(keys: Mapping[str, Json], optional: Mapping[str, Json] | None = None) -> Json:
    """An object with these keys; all of them are always there, but for the optional ones."""
    properties = {**keys, **(optional or {})}
    return {"type": "object", "required": list(keys), "properties": properties}


def rows(keys: Mapping[str, Json]) -> Json:
    return {"type": "array", "items": form(keys)}


REASON = form({"text": TEXT, "old": {}, "new": {}})
REASONS: Json = {"type": "array", "items": REASON}
OUTPUTS = rows({"path": TEXT, "digest": DIGEST, "bytes": BYTES})

STATUS = rows(
    {
        "artifact": TEXT,
        "state": {"enum": [*STATES, "orphan"]},
        "reasons": REASONS,
        "outputs": TEXTS,
        "removed_after_use": FLAG,
        "built": maybe(TIME),
        "wall": maybe(SECONDS),
        "memory": maybe(BYTES),
    }
)
WHY = rows(
    {
        "artifact": TEXT,
        "state": {"enum": list(STATES)},
        "reasons": REASONS,
        "causes": {"type": "object", "additionalProperties": REASONS},
        "key": maybe(TEXT),
        "built": maybe(TIME),
        "last_built_because": TEXTS,
    }
)
LOG = rows(
    {
        "step": TEXT,
        "how": {
            "enum": [
                "made",
                "failed",
                "restored",
                "adopted",
                "running",
                "interrupted",
                "never",
            ]
        },
        "at": maybe(TIME),
        "seconds": maybe(SECONDS),
        "memory": maybe(BYTES),
        "exit": maybe({"type": "integer"}),
        "signal": COUNT,
        "error": TEXT,
        "log": maybe(TEXT),
    }
)
FORECAST = form(
    {
        "steps": rows(
            {
                "artifact": TEXT,
                "certain": FLAG,
                "restored": FLAG,
                "reasons": REASONS,
                "seconds": maybe(SECONDS),
                "bytes": maybe(BYTES),
                "known_from": {"enum": ["last run", "store", "rule", "none"]},
            }
        ),
        "skipped": TEXTS,
        "jobs": {"type": "integer", "minimum": 1},
        "work_seconds": SECONDS,
        "wall_seconds": SECONDS,
        "chain_seconds": SECONDS,
        "written_bytes": BYTES,
        "free_bytes": BYTES,
    }
)


def event(name: str, keys: Mapping[str, Json], optional: Mapping[str, Json] | None = None) -> Json:
    return form({"event": {"const": name}, "time": TIME, **keys}, optional)


STEP = {"step": TEXT}
FIGURES = {"seconds": SECONDS, "cpu_seconds": SECONDS, "peak_rss": BYTES}
MADE = {**STEP, "key": TEXT, "outputs": OUTPUTS}
EVENTS: Json = {
    "oneOf": [
        event(
            "build_started",
            {
                "version": {"const": 1},
                "recipe": TEXT,
                "name": TEXT,
                "folder": TEXT,
                "defines": {"type": "object", "additionalProperties": TEXT},
            },
        ),
        event("steps", {"most": COUNT, "jobs": {"type": "integer", "minimum": 1}}),
        event("step_started", {**STEP, "why": TEXT}),
        event(
            "step_progress",
            {**STEP, "done": {"type": "number"}, "total": {"type": "number"}, "unit": TEXT},
        ),
        event("step_ended", {"status": {"const": "made"}, **MADE, **FIGURES, "warnings": TEXTS}),
        event(
            "step_ended",
            {"status": {"const": "failed"}, **STEP, **FIGURES, "error": TEXT, "log": TEXT},
            {"exit_code": {"type": "integer"}, "signal": COUNT},
        ),
        event("step_ended", {"status": {"const": "interrupted"}, **STEP, **FIGURES}),
        event("cached", {**MADE, "origin": TEXT}),
        event("step_fresh", STEP),
        event("message", {"level": {"enum": ["info", "warning", "error"]}, "text": TEXT}),
        event(
            "build_ended",
            {
                "status": {"enum": ["done", "failed", "interrupted"]},
                "exit_code": COUNT,
                "seconds": SECONDS,
                "made": TEXTS,
                "restored": TEXTS,
                "failed": TEXTS,
                "not_started": TEXTS,
                "fresh": TEXTS,
                "gates": rows({"gate": TEXT, "passed": FLAG}),
            },
        ),
        event(
            "build_ended",
            {"status": {"const": "error"}, "exit_code": COUNT, "seconds": SECONDS, "error": TEXT},
        ),
    ]
}
FORMS: Mapping[str, tuple[str, Json]] = {
    "status": ("qbuild status --json", STATUS),
    "why": ("qbuild why TARGET --json", WHY),
    "log": ("qbuild log --json", LOG),
    "forecast": ("qbuild all -n --log-format json", FORECAST),
    "events": ("one line of qbuild all --log-format json", EVENTS),
}


def schema_of(name: str) -> Json:
    """The whole schema of one of `FORMS`."""
    title, content = FORMS[name]
    return {"$schema": DIALECT, "title": title, **content}
