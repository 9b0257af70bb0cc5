"""Models on the Hugging Face hub: fetched once, before anything is digested.

They go to the hub's own cache. A build folder remembers the snapshot that it was made with
and stays with it, so that what is behind a branch's name may move without rebuilding anything;
`qbuild clean --all` forgets it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from buildsys.engine.folder import BuildFolder, read_json, write_json
from buildsys.errors import QbuildError

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Source

# What a Qwen2 or Qwen2-VL is read from; no pickles, no code.
PATTERNS = ("*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.jinja", "tokenizer.model")


class ModelNotFetched(QbuildError):
    """A model on the hub cannot be had from here."""


def with_fetched_models(plan: Plan, folder: BuildFolder) -> Plan:
    """The plan with the paths of hub models that this build folder has a snapshot of."""
    if not any(_is_on_hub(source) for source in plan.sources.values()):
        return plan
    known = read_json(folder.own("hub")) or {}
    sources = dict(plan.sources)
    for name, source in plan.sources.items():
        path = known.get(snapshot_name(source)) if _is_on_hub(source) else None
        if path is not None and os.path.isdir(path):
            sources[name] = source._replace(paths={**source.paths, "path": path})
    return plan._replace(sources=sources)


def fetch_models(
    plan: Plan, steps: Iterable[str], folder: BuildFolder, say: Callable[[str], None]
) -> Plan:
    """Fetch the models on the hub that these steps read and that are not here yet; the plan with
    them.

    Raises ModelNotFetched.
    """
    away = unfetched(plan)
    if not away:
        return plan
    from buildsys.plan.missing import sources_read

    missing = [plan.sources[name] for name in sources_read(plan, steps) if name in away]
    if not missing:
        return plan
    known = read_json(folder.own("hub")) or {}
    for source in missing:
        say(f"fetching {snapshot_name(source)} from the hub: there is no folder of that name")
        # A snapshot that vanished from the hub's cache is fetched again, the same commit.
        before = known.get(snapshot_name(source))
        revision = os.path.basename(before) if before else source.options.get("revision")
        known[snapshot_name(source)] = download(source, revision)
    write_json(folder.own("hub"), known)
    return with_fetched_models(plan, folder)


def unfetched(plan: Plan) -> set[str]:
    """The sources that are models on the hub and not here."""
    return {name for name, source in plan.sources.items() if _is_on_hub(source)}


def without_snapshots(plan: Plan) -> Plan:
    """The plan as the recipe has it: where the hub's cache is belongs to no plan."""
    sources = {
        name: source._replace(paths={**source.paths, "path": ""})
        if "hub" in source.options
        else source
        for name, source in plan.sources.items()
    }
    return plan._replace(sources=sources)


def snapshot_name(source: Source) -> str:
    revision = source.options.get("revision")
    return f"{source.options['hub']}" + (f"@{revision}" if revision else "")


def _is_on_hub(source: Source) -> bool:
    return source.kind == "model" and not source.paths.get("path")


def download(source: Source, revision: str | None) -> str:
    """The folder of a snapshot in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub = source.options["hub"]
    try:
        return str(snapshot_download(hub, revision=revision, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFetched(
            f"source '{source.name}': the model {hub} could not be fetched ({reason})",
            remedy=f"there is no folder '{hub}' either: beside the recipe, or for -D here;\n"
            "give a folder that holds it: -D model=FOLDER, or a path in the recipe",
            location=source.where,
        ) from error
