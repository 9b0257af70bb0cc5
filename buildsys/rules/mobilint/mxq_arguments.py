"""From the options of rule `mxq` to what one generation of the compiler is called with.

Nothing here touches a file or the compiler: the result is plain data, which
`in_compiler/mxq_call.py` turns into calls, and `command_line` into arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError

if TYPE_CHECKING:
    from buildsys.plan.graph import Json
    from buildsys.rules.mobilint.generations import Generation

TRANSFORMS = {
    "language": ("QK", "UD", "SpinR1", "SpinR2"),
    "vision": ("HeadOutChRotation",),
}
ACTIVATION_16BITS = {"language": ["inputs_embeds/reshape"], "vision": ["model_merger_fc2"]}
CALIBRATION = ("method", "output", "mode")
ARIES = ("aries", "aries-rb")
# What get_equivalent_transformation_config calls what CompileConfig calls otherwise.
FUNCTION_NAMES = {
    "QK": "qk",
    "UD": "ud",
    "SpinR1": "spin_r1",
    "SpinR2": "spin_r2",
    "HeadOutChRotation": "head_out_ch_rotation",
}


def transforms_of(options: Mapping[str, Json]) -> tuple[str, ...]:
    """The equivalent transformations that are asked for; those of the tutorial by default."""
    given = options["transforms"]
    return TRANSFORMS[options["part"]] if given is None else tuple(given)


def call_of(
    options: Mapping[str, Json], generation: Generation, device: str, rotation: str | None
) -> dict[str, Json]:
    """Everything but the paths. device: "cpu" or "cuda". rotation: path of the text model's.

    Raises StepError for an option that this generation does not have.
    """
    part = options["part"]
    _refuse_unknown_options(options, generation)
    keywords: dict[str, Json] = {
        "device": _device(options["device"] or device, generation),
        "inference_scheme": options["inference_scheme"] or _scheme(options, generation),
    }
    if options["single_core"] or (options["single_core"] is None and part == "language"):
        keywords |= {"singlecore_compile": True} if generation.single_core else {}
    if generation.target:
        keywords["target_device"] = options["target_device"]
    bits = options["activation_16bits"]
    return {
        "module": generation.module,
        "config": generation.config,
        "names": list(generation.keywords),
        "keywords": keywords,
        "calibration": _calibration(options, generation),
        "activation_16bits": ACTIVATION_16BITS[part] if bits is None else bits,
        "transforms": _transforms(options, rotation),
        "llm_config": generation.llm_config and part == "language",
        "extra": options["compile_config"],
    }


def _transforms(options: Mapping[str, Json], rotation: str | None) -> dict[str, Json]:
    """CompileConfig's own spelling, which is also the one of recipes."""
    found: dict[str, Json] = {name: {"apply": True} for name in transforms_of(options)}
    if "UD" in found:
        found["UD"]["learn"] = options["ud_learn"]
    if "HeadOutChRotation" in found:
        found["HeadOutChRotation"]["matrixPath"] = rotation
    return found


def by_function_names(transforms: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    """The keywords of get_equivalent_transformation_config.

    >>> by_function_names({"UD": {"apply": True, "learn": False}})
    {'ud_apply': True, 'ud_learn': False}
    """
    endings = {"apply": "apply", "learn": "learn", "matrixPath": "matrix_path"}
    return {
        f"{FUNCTION_NAMES[name]}_{endings[key]}": value
        for name, fields in transforms.items()
        for key, value in fields.items()
    }


def nested(call: Mapping[str, Json]) -> dict[str, Json]:
    """The same as one CompileConfig, with what the recipe adds to it."""
    config: dict[str, Any] = {
        "bit": {"layerOverrides": {"activation16Bits": call["activation_16bits"]}},
        "equivalentTransformation": call["transforms"],
    }
    if call["calibration"]:
        config["calibration"] = call["calibration"]
    return {**config, **call["extra"]}


def _calibration(options: Mapping[str, Json], generation: Generation) -> dict[str, int]:
    given = {
        name: options[f"calibration_{name}"]
        for name in CALIBRATION
        if options[f"calibration_{name}"] is not None
    }
    return given or dict(generation.calibration.get(options["part"], {}))


def _device(device: str, generation: Generation) -> str:
    if device != "cpu":
        return generation.gpu
    if generation.cpu is None:
        raise StepError(
            f"{_told(generation)} is documented for GPUs alone",
            remedy="Add `resources: {gpu: 1}`, or `device: gpu` to the options.",
        )
    return generation.cpu


def _scheme(options: Mapping[str, Json], generation: Generation) -> str:
    if options["target_device"] not in ARIES:
        return "single"
    return generation.schemes[options["part"]]


def _refuse_unknown_options(options: Mapping[str, Json], generation: Generation) -> None:
    """What this generation cannot do is an error: left out, it would be a silent fallback."""
    told = _told(generation)
    if options["single_core"] and not generation.single_core:
        raise StepError(
            f"{told} has no single core option (it was removed in 1.0)",
            remedy="Give `inference_scheme: single` instead.",
        )
    if not generation.target and options["target_device"] not in ARIES:
        raise StepError(f"{told} compiles for ARIES alone, not for {options['target_device']}")
    if options["compile_config"] and generation.config == "functions":
        raise StepError(f"{told} has no CompileConfig", remedy="Remove `compile_config`.")
    if options["calibration_method"] is not None and generation.config == "functions":
        raise StepError(f"{told} has no calibration method", remedy="Remove `calibration_method`.")
    if options["interface"] == "command-line" and not generation.command_line:
        raise StepError(
            f"{told} has no command line that works (1.3 has)", remedy="Give `interface: python`."
        )


def _told(generation: Generation) -> str:
    return f"{generation.module} {'.'.join(map(str, generation.since))}"
