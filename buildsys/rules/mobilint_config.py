"""Rule `mobilint-config`: the config.json that Mobilint's client reads, from the model's own.

The edits are those of the vendor's tutorial (get_config.py): where the mxq files are, and the
client's names for architecture and model type. `core_mode` is an edit of the client's later
versions: an mxq compiled with inference_scheme "all" is refused where it is left to "auto".
The digest of the rotation that the mxq was made with is written down as well: the client leaves
it alone, and deploying compares it with that of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    """Each mxq is given once: as an input, or as a bare file name; both are of one rotation,
    and run in the mode that is written down."""
    makers = {part: _maker(step, plan, part) for part in PARTS}
    for part in PARTS:
        if bool(step.inputs.get(part)) == bool(step.options.get(part)):
            yield Problem(
                f"the {part} mxq is given {'twice' if step.options.get(part) else 'nowhere'}",
                f"Give it as input `{part}` or, as a bare file name, as option `{part}`.",
                option=part if step.options.get(part) else None,
            )
        maker = makers[part]
        if maker is not None:
            yield from _wrong_mode(step, part, maker)
    if makers["text"] is not None and makers["vision"] is not None:
        yield from _two_rotations(step, makers["text"], makers["vision"])


def _maker(step: Step, plan: Plan, part: str) -> Step | None:
    """The mxq step behind an input; None where something else made it."""
    names = [plan.producer.get(ref.name, "") for ref in step.inputs.get(part, ())]
    found = plan.steps.get(names[0]) if names else None
    return found if found is not None and found.rule == "mxq" else None


def _wrong_mode(step: Step, part: str, maker: Step) -> Iterator[Problem]:
    """An mxq that was compiled for one mode runs in no other."""
    mode = _mode(step.options, part)
    scheme = maker.options.get("inference_scheme")
    regulus = str(maker.options.get("target_device", "")).startswith("regulus")
    scheme = "single" if scheme is None and regulus else scheme
    if scheme not in (None, "all") and mode not in (scheme, "auto", None):
        option = "vision_core_mode" if part == "vision" else "core_mode"
        message = f"{maker.name} is compiled for '{scheme}' alone, and is to run as '{mode}'"
        yield Problem(message, f"Give `{option}: {scheme}`.", option=option)


def _two_rotations(step: Step, text: Step, vision: Step) -> Iterator[Problem]:
    """The vision encoder's head must be turned by the language model's rotation."""
    own = text.outputs.get("rotation")
    given = [ref.name for ref in vision.inputs.get("rotation", ())]
    if own is not None and given and given != [own]:
        message = f"{vision.name} is made with {given[0]}, and {text.name} with its own {own}"
        yield Problem(message, f"Give {vision.name} the rotation {own}.", input="vision")
    recorded = [ref.name for ref in step.inputs.get("rotation", ())]
    if own is not None and recorded and recorded != [own]:
        message = f"{recorded[0]} is not the rotation of {text.name}, which is {own}"
        yield Problem(message, f"Give {own}.", input="rotation")


def _mode(options: Mapping[str, Any], part: str) -> str | None:
    own = options.get("vision_core_mode") if part == "vision" else None
    mode: str | None = own or options.get("core_mode")
    return mode


RULE = Rule(
    name="mobilint-config",
    doc="config.json for Mobilint's client: the model's own, with the names of the mxq files.",
    inputs={
        "model": InputSpec(
            "A Qwen2-VL model.", kinds=("model", "artifact", "folder"), parts=("config",)
        ),
        "text": InputSpec("The language model's mxq.", required=False),
        "vision": InputSpec("The vision encoder's mxq.", required=False),
        "rotation": InputSpec(
            "The language mxq's rotation: its digest is written down.", required=False
        ),
    },
    options={
        "text": {**_BARE_NAME, "description": "File name of the language mxq beside the config."},
        "vision": {**_BARE_NAME, "description": "File name of the vision mxq beside the config."},
        "core_mode": {
            "enum": [None, *MODES],
            "default": "global8",
            "description": "How the NPU's cores share the work: what the mxq is compiled for, "
            "or any where that is all. null leaves it to the client, which then refuses the "
            "latter.",
        },
        "vision_core_mode": {
            "enum": [None, *MODES],
            "default": None,
            "description": "The same for the vision encoder; null: as core_mode.",
        },
        "target_cores": {
            "type": ["array", "null"],
            "items": {"type": "string", "pattern": "^[0-9]+:[0-9]+$"},
            "default": None,
            "description": "cluster:core for the mode single; null leaves it to the client.",
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
        fields=_fields(step.options, "text"),
        vision_fields=_fields(step.options, "vision"),
    )
    rotation = step.maybe("rotation")
    if rotation is not None:
        edited["qbuild"] = {"rotation": rotation.digest}
        step.note("rotation", {"digest": rotation.digest})
    step.out.write_text(json.dumps(edited, indent=2, ensure_ascii=False), encoding="utf-8")


def _fields(options: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What the client reads of one part's cores."""
    found = {"core_mode": _mode(options, part), "target_cores": options["target_cores"]}
    return {name: value for name, value in found.items() if value is not None}


def edit(
    config: dict[str, Any],
    *,
    text: str,
    vision: str,
    fields: Mapping[str, Any],
    vision_fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The config with the client's fields; `text` and `vision` are file names beside it."""
    if text == vision:
        raise StepError(f"both mxq files are called {text!r}; the client finds them by name")
    length = {"max_position_embeddings": CONTEXT, "sliding_window": CONTEXT}
    edited = {
        **config,
        "architectures": ["MobilintQwen2VLForConditionalGeneration"],
        "model_type": "mobilint-qwen2_vl",
        **length,
        "tie_word_embeddings": True,
        "mxq_path": text,
        "vision_config": {**config["vision_config"], "mxq_path": vision, **vision_fields},
        **fields,
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
