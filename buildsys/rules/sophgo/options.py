"""The options of rule `bmodel`, what is wrong with them, and how the installed converter is told.

Nothing here reads a model: that is for `model_folder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.spec import Problem

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

MODES = ("auto", "bf16", "w8bf16", "w4bf16", "f16", "w8f16", "w4f16")
# Cores of each chip: what `num_core` may be at most.
CHIPS = {"bm1684x": 1, "bm1688": 2, "cv186x": 1, "cv186ah": 1, "bm1684x2": 4}
# The same chip; versions of the converter know one name or the other.
OTHER_NAME = {"cv186ah": "cv186x", "cv186x": "cv186ah"}
CHUNK = 28  # pixels: one merged token of a Qwen2-VL
FLAGS = ("symmetric", "embedding_disk", "dynamic", "use_history_kv", "do_sample")

SCHEMA: dict[str, Mapping[str, Json]] = {
    "seq_length": {
        "type": "integer",
        "minimum": 2,
        "description": "Tokens that the model can hold: prompt and answer together.",
    },
    "quantize": {
        "enum": list(MODES),
        "default": "auto",
        "description": "Weights and arithmetic; bf16 or f16 must be the checkpoint's own, unless "
        "that is float32. auto: an AWQ or GPTQ checkpoint as it is.",
    },
    "q_group_size": {
        "type": "integer",
        "minimum": 0,
        "default": 64,
        "description": "Weights that share a scale, with 4 bits; 0: a whole row.",
    },
    "chip": {
        "enum": list(CHIPS),
        "default": "bm1684x",
        "description": "cv186ah and cv186x are one chip.",
    },
    "num_device": {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "Over how many chips the model is spread.",
    },
    "num_core": {
        "type": ["integer", "null"],
        "minimum": 1,
        "default": None,
        "description": "Cores of a chip that work together; null: all that it has.",
    },
    "symmetric": {
        "type": "boolean",
        "default": False,
        "description": "Quantized weights without a zero point.",
    },
    "max_input_length": {
        "type": ["integer", "null"],
        "minimum": 1,
        "default": None,
        "description": "Tokens of the longest prompt; null: seq_length.",
    },
    "embedding_disk": {
        "type": "boolean",
        "default": False,
        "description": "The embedding is a file that the host reads; needs output `config`.",
    },
    "max_pixels": {
        "type": ["integer", "string", "array", "null"],
        "minimum": CHUNK * CHUNK,
        "items": {"type": "integer", "minimum": CHUNK},
        "minItems": 2,
        "maxItems": 2,
        "default": None,
        "description": "The largest image of a vision model: 'WIDTH,HEIGHT', or their product.",
    },
    "dynamic": {
        "type": "boolean",
        "default": False,
        "description": "The prompt costs what its length costs, not what seq_length does.",
    },
    "use_history_kv": {
        "type": "boolean",
        "default": False,
        "description": "A further prompt goes on from the cache of the one before.",
    },
    "do_sample": {
        "type": "boolean",
        "default": False,
        "description": "Heads for sampling too; without it the most likely token is the answer.",
    },
}


def problems(options: Mapping[str, Json], outputs: Mapping[str, str]) -> Iterator[Problem]:
    """What no compiler needs to be asked about."""
    longest, length = options["max_input_length"], options["seq_length"]
    if longest is not None and longest > length:
        message = f"a prompt of {longest} tokens does not fit into seq_length, {length}"
        yield Problem(message, option="max_input_length")
    if longest is not None and options["use_history_kv"]:
        yield Problem(
            "with use_history_kv prompts come in chunks of a quarter of seq_length",
            "Leave max_input_length out.",
            option="max_input_length",
        )
    cores, most = options["num_core"], CHIPS[options["chip"]]
    if cores is not None and cores > most:
        yield Problem(f"{options['chip']} has {most} core{'s' * (most > 1)}", option="num_core")
    if options["embedding_disk"] and "config" not in outputs:
        yield Problem(
            "embedding_disk writes the embedding to a file, embedding.bin in output 'config'",
            "Keep it: `outputs: {config: NAME/}`.",
            option="embedding_disk",
        )
    if options["max_pixels"] is not None:
        try:
            image_size(options["max_pixels"])
        except StepError as error:
            yield Problem(error.message, error.remedy, option="max_pixels")


def image_size(value: Json) -> tuple[int, int]:
    """(width, height) of `max_pixels`: 'W,H', [W, H], or their product, for which the most
    square image of whole tokens is chosen. Raises StepError.

    >>> image_size(602112)
    (672, 896)
    """
    if isinstance(value, int):
        return _most_square(value)
    words = value.split(",") if isinstance(value, str) else list(value)
    try:
        width, height = map(int, words)
    except ValueError as error:
        raise StepError(
            f"max_pixels is '{value}'", remedy="Give 'WIDTH,HEIGHT', such as '672,896'."
        ) from error
    if width < CHUNK or height < CHUNK or width * height % CHUNK**2:
        raise StepError(
            f"{width} x {height} pixels are no whole number of tokens of {CHUNK} x {CHUNK}",
            remedy=f"Such as '{_whole(width)},{_whole(height)}'.",
        )
    return width, height


def _most_square(pixels: int) -> tuple[int, int]:
    tokens, rest = divmod(pixels, CHUNK**2)
    if rest or not tokens:
        near = max(1, round(pixels / CHUNK**2)) * CHUNK**2
        raise StepError(
            f"max_pixels {pixels} is no whole number of tokens of {CHUNK} x {CHUNK} pixels",
            remedy=f"The nearest is {near}.",
        )
    side = next(n for n in range(int(tokens**0.5), 0, -1) if tokens % n == 0)
    return side * CHUNK, tokens // side * CHUNK


def _whole(pixels: int) -> int:
    return max(1, round(pixels / CHUNK)) * CHUNK


def known_arguments(converter: Path) -> dict[str, tuple[str, ...]]:
    """The options that an installed llm_convert.py takes, each with its choices (empty: any).

    Its source is parsed, not run.
    """
    import ast

    known: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(ast.parse(converter.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "add_argument":
            continue
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        choices = next((word.value for word in node.keywords if word.arg == "choices"), None)
        listed = ast.literal_eval(choices) if isinstance(choices, ast.List) else ()
        known |= {str(name): tuple(map(str, listed)) for name in names}
    return known


def arguments(
    options: Mapping[str, Json], known: Mapping[str, Sequence[str]], version: str
) -> list[str]:
    """The words that tell the converter what the options say. Raises StepError for what the
    installed version cannot do."""
    given: dict[str, str] = {
        "--seq_length": str(options["seq_length"]),
        "--quantize": options["quantize"],
        "--q_group_size": str(options["q_group_size"]),
        "--chip": _chip(options["chip"], known.get("--chip", ())),
    }
    if options["num_device"] > 1:
        given["--num_device"] = str(options["num_device"])
    for name in ("num_core", "max_input_length"):
        if options[name] is not None:
            given[f"--{name}"] = str(options[name])
    if options["max_pixels"] is not None:
        given["--max_pixels"] = ",".join(map(str, image_size(options["max_pixels"])))
    given |= {f"--{name}": "" for name in FLAGS if options[name]}
    for name, value in given.items():
        if name not in known:
            raise StepError(f"TPU-MLIR {version} has no option {name.removeprefix('--')}")
        if known[name] and value not in known[name]:
            choices = ", ".join(known[name])
            raise StepError(
                f"TPU-MLIR {version} knows no {name.removeprefix('--')} {value}",
                remedy=f"It knows: {choices}.",
            )
    return [word for pair in given.items() for word in pair if word]


def _chip(name: str, known: Sequence[str]) -> str:
    other = OTHER_NAME.get(name)
    return other if name not in known and other in known and other is not None else name
