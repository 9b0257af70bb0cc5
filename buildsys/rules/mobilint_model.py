"""Rule `mobilint-model`: the folder that Mobilint's client loads, complete and of one piece.

Four files that were made here (two mxq, config.json, model.safetensors) and the tokenizer's and
processor's files of the model. Parts that do not belong together load, run and talk nonsense:
so they are compared here, file with file, before they can reach a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.spec import InputSpec, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

# tokenizer.json is enough for a fast tokenizer; the others are taken where they are.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
NEEDED = ("tokenizer.json", "preprocessor_config.json|processor_config.json")
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight")

RULE = Rule(
    name="mobilint-model",
    doc="The folder that Mobilint's client loads: both mxq, config, embedding, tokenizer.",
    inputs={
        "model": InputSpec(
            "The model; its tokenizer and processor are taken.",
            kinds=("model", "artifact", "folder"),
            parts=("config", "tokenizer", "processor"),
        ),
        "text": InputSpec("The language model's mxq."),
        "vision": InputSpec("The vision encoder's mxq."),
        "config": InputSpec("config.json of rule mobilint-config."),
        "embedding": InputSpec("model.safetensors of rule rotated-embedding."),
    },
    worker="python",
    folder=True,
)


def make(step: StepContext) -> None:
    """Check and copy. Raises StepError naming the two files that do not belong together."""
    import shutil

    check_parts(step)
    step.out.mkdir(exist_ok=True)
    files = {
        step.one("text").path.name: step.one("text").path,
        step.one("vision").path.name: step.one("vision").path,
        "config.json": step.one("config").path,
        "model.safetensors": step.one("embedding").path,
        **_of_model(step.one("model").path),
    }
    for done, (name, source) in enumerate(files.items()):
        step.progress(done, len(files), "files")
        shutil.copyfile(source, step.out / name)


def _of_model(folder: Path) -> dict[str, Path]:
    """Tokenizer and processor. Raises StepError where one of those that are needed is missing."""
    for needed in NEEDED:
        if not any((folder / name).is_file() for name in needed.split("|")):
            raise StepError(
                f"{folder}: there is no {needed.replace('|', ' or ')}",
                remedy="Take it from the model's page on the hub: the client needs it.",
            )
    return {name: folder / name for name in COPIED if (folder / name).is_file()}


def check_parts(step: StepContext) -> None:
    """The config names these mxq files, and everything is of one rotation and one model."""
    import json

    from buildsys.formats.safetensors_file import SafetensorsSource

    config: dict[str, Any] = json.loads(step.one("config").path.read_text(encoding="utf-8"))
    named = {"text": config.get("mxq_path"), "vision": config["vision_config"].get("mxq_path")}
    for part, name in named.items():
        own = step.one(part).path.name
        if name != own:
            raise StepError(f"config.json names {name} as the {part} mxq, which is {own} here")
    source = SafetensorsSource(step.one("embedding").path)
    names = list(source.names())
    if len(names) != 1 or names[0] not in EMBEDDINGS:
        raise StepError(f"the embedding's file holds {names}; the client reads {EMBEDDINGS[0]}")
    nested = config.get("text_config")
    text = {**config, **(nested if isinstance(nested, dict) else {})}
    expected = (text["vocab_size"], text["hidden_size"])
    if source.shape(names[0]) != expected:
        raise StepError(
            f"the embedding is {list(source.shape(names[0]))}, config.json says {list(expected)}"
        )
    written = config.get("qbuild", {}).get("rotation")
    turned = dict(source.metadata).get("rotation")
    if written is not None and turned is not None and written != turned:
        raise StepError(
            "config.json and the embedding are of two rotations: "
            f"{str(written)[:12]} and {str(turned)[:12]}",
            remedy="Make both from the rotation output of the language mxq.",
        )
    step.note("rotation", {"digest": written or turned})
