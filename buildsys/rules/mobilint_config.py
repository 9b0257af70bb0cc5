"""Rule `mobilint-config`: the config.json that Mobilint's client reads, from the model's own.

The edits are those of the vendor's tutorial (get_config.py): where the mxq files are, and the
client's names for architecture and model type. `core_mode` is an edit of the client's later
versions: an mxq compiled with inference_scheme "all" is refused where it is left to "auto".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.spec import InputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from buildsys.plan.graph import Plan, Step

PARTS = ("text", "vision")
CONTEXT = 32768
MODES = ("auto", "single", "multi", "global4", "global8")
_BARE_NAME = {"type": ["string", "null"], "pattern": "^[^/\\\\]+$", "default": None}


def check(step: Step, plan: Plan) -> Iterable[Problem]:
    """Each mxq is given once: as an input, or as a bare file name."""
    for part in PARTS:
        if bool(step.inputs.get(part)) == bool(step.options.get(part)):
            yield Problem(
                f"the {part} mxq is given {'twice' if step.options.get(part) else 'nowhere'}",
                f"Give it as input `{part}` or, as a bare file name, as option `{part}`.",
                option=part if step.options.get(part) else None,
            )


RULE = Rule(
    name="mobilint-config",
    doc="config.json for Mobilint's client: the model's own, with the names of the mxq files.",
    inputs={
        "model": InputSpec(
            "A Qwen2-VL model.", kinds=("model", "artifact", "folder"), parts=("config",)
        ),
        "text": InputSpec("The language model's mxq.", required=False),
        "vision": InputSpec("The vision encoder's mxq.", required=False),
    },
    options={
        "text": {**_BARE_NAME, "description": "File name of the language mxq beside the config."},
        "vision": {**_BARE_NAME, "description": "File name of the vision mxq beside the config."},
        "core_mode": {
            "enum": [None, *MODES],
            "default": None,
            "description": "How the NPU's cores share the work; null leaves it to the client.",
        },
    },
    check=check,
)


def make(step: StepContext) -> None:
    """Write the edited config.json. Raises StepError for a model that is no Qwen2-VL."""
    import json

    from buildsys.formats.config_file import read_config

    config = read_config(step.one("model").path)
    if config.text("model_type") != "qwen2_vl":
        raise config.wrong(
            "model_type",
            f"is {config.text('model_type')!r}: Mobilint's client has this config for Qwen2-VL",
        )
    edited = edit(
        {**config.fields, "vision_config": {**config.section("vision_config").fields}},
        text=_mxq(step, "text"),
        vision=_mxq(step, "vision"),
        core_mode=step.options["core_mode"],
    )
    step.out.write_text(json.dumps(edited, indent=2, ensure_ascii=False), encoding="utf-8")


def edit(
    config: dict[str, Any], *, text: str, vision: str, core_mode: str | None
) -> dict[str, Any]:
    """The config with the client's fields; `text` and `vision` are file names beside it."""
    if text == vision:
        raise StepError(f"both mxq files are called {text!r}; the client finds them by name")
    modes = {} if core_mode is None else {"core_mode": core_mode}
    length = {"max_position_embeddings": CONTEXT, "sliding_window": CONTEXT}
    edited = {
        **config,
        "architectures": ["MobilintQwen2VLForConditionalGeneration"],
        "model_type": "mobilint-qwen2_vl",
        **length,
        "tie_word_embeddings": True,
        "mxq_path": text,
        "vision_config": {**config["vision_config"], "mxq_path": vision, **modes},
        **modes,
    }
    if isinstance(config.get("text_config"), dict):
        # transformers 5 nests the language model's fields, and reads them there.
        edited["text_config"] = {**config["text_config"], **length}
    return edited


def _mxq(step: StepContext, part: str) -> str:
    given = step.maybe(part)
    name = PurePosixPath(given.path).name if given is not None else step.options[part]
    if not name or name in (".", ".."):
        raise StepError(f"{step.name}: the {part} mxq is missing")
    return str(name)
