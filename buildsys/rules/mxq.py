"""Rule `mxq`: Mobilint's quantized binary, from an mblt and a calibration set.

The language mxq is compiled with a random rotation of the residual stream that the compiler
draws itself. It is an output of its own here, taken from where that version of the compiler
writes it, so that the vision mxq and the embedding cannot be made with another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.mobilint import mxq_arguments
from buildsys.rules.mobilint.mxq_arguments import transforms_of
from buildsys.rules.spec import InputSpec, Memory, OutputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.plan.graph import Json, Plan, Step
    from buildsys.rules.mobilint.generations import Generation

OWN_ROTATION, HEAD_ROTATION = "SpinR1", "HeadOutChRotation"


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """The rotation has one origin and reaches everything that needs it."""
    transforms = transforms_of(step.options)
    if OWN_ROTATION in transforms and "rotation" not in step.outputs:
        yield Problem(
            f"{OWN_ROTATION} draws a rotation that the vision mxq and the embedding need",
            "Keep it: `outputs: {rotation: mxq/global_rotation.pth}`.",
        )
    if OWN_ROTATION not in transforms and "rotation" in step.outputs:
        yield Problem(f"without {OWN_ROTATION} there is no rotation to keep", option="transforms")
    given = bool(step.inputs.get("rotation"))
    if given != (HEAD_ROTATION in transforms):
        yield Problem(
            f"{HEAD_ROTATION} turns the head by the language mxq's rotation, and "
            + ("it is not asked for" if given else "none is given"),
            "Give both or neither: `inputs: {rotation: ...}` and the transform.",
            input="rotation" if given else None,
            option=None if given else "transforms",
        )
    yield from _other_makers(step, plan)


def _other_makers(step: Step, plan: Plan) -> Iterator[Problem]:
    """Artifacts given as inputs are of the right part."""
    for name, rule in (("mblt", "mblt"), ("calibration", "calibration-set")):
        for ref in step.inputs.get(name, ()):
            maker = plan.steps.get(plan.producer.get(ref.name, ""))
            if maker is None or maker.rule != rule:
                continue
            part = maker.options.get("part")
            if part != step.options["part"]:
                yield Problem(f"{ref.name} is of the {part} part", input=name)
    for ref in step.inputs.get("rotation", ()):
        maker = plan.steps.get(plan.producer.get(ref.name, ""))
        if maker is not None and maker.rule != "mxq":
            message = f"{ref.name} is made by {maker.rule}: the compiler draws its own rotation"
            yield Problem(
                message, "Give the rotation output of the language mxq.", input="rotation"
            )


def _number(description: str) -> dict[str, Json]:
    return {"enum": [None, 0, 1, 2], "default": None, "description": description}


RULE = Rule(
    name="mxq",
    doc="A .mxq for Mobilint's NPUs; the language model's rotation is its second output.",
    inputs={
        "mblt": InputSpec("The model as rule mblt writes it."),
        "calibration": InputSpec("A folder of rule calibration-set.", kinds=("artifact", "folder")),
        "rotation": InputSpec(
            "The language mxq's rotation, for the vision encoder's head.", required=False
        ),
    },
    options={
        "part": {"enum": ["language", "vision"], "description": "Which half of the model it is."},
        "transforms": {
            "type": ["array", "null"],
            "items": {"enum": sorted(mxq_arguments.FUNCTION_NAMES)},
            "default": None,
            "description": "Equivalent transformations; null: QK, UD, SpinR1 and SpinR2 for the "
            "language model, HeadOutChRotation for the vision encoder.",
        },
        "ud_learn": {
            "type": "boolean",
            "default": True,
            "description": "UD's factors are learnt rather than computed.",
        },
        "activation_16bits": {
            "type": ["array", "null"],
            "items": {"type": "string"},
            "default": None,
            "description": "Layers whose activations have 16 bits; null: the tutorial's.",
        },
        "inference_scheme": {
            "enum": [None, "single", "multi", "global4", "global8", "all"],
            "default": None,
            "description": "How the cores share the work; null: the tutorial's of that version.",
        },
        "single_core": {
            "type": ["boolean", "null"],
            "default": None,
            "description": "singlecore_compile, before 1.0; null: for the language model.",
        },
        "calibration_mode": _number("0 max, 1 max-percentile, 2 histogram."),
        "calibration_method": {
            **_number("0 and 1 per channel, one or several layers; 2 and 3 with zero points."),
            "enum": [None, 0, 1, 2, 3],
        },
        "calibration_output": _number("Ranges of outputs: 0 per layer, 1 per channel, 2 sigmoid."),
        "target_device": {
            "enum": ["aries-rb", "regulus-ra", "regulus-rb", "regulus-rb-usb"],
            "default": "aries-rb",
            "description": "The NPU; compilers before 1.2 know ARIES alone.",
        },
        "device": {
            "enum": [None, "cpu", "gpu"],
            "default": None,
            "description": "Where the compiler computes; null: a GPU where resources reserve one.",
        },
        "interface": {
            "enum": ["python", "command-line"],
            "default": "python",
            "description": "How the compiler is called; its command line works from 1.3 on.",
        },
        "compile_config": {
            "type": "object",
            "default": {},
            "description": "Further fields of CompileConfig, in its own spelling; they win.",
        },
    },
    outputs={"rotation": OutputSpec("global_rotation.pth, the residual stream's rotation.", None)},
    toolchain="mobilint-compiler",
    distributions=("torch",),
    worker="python",
    memory=Memory(whole=2.0),
    check=check,
)


def make(step: StepContext) -> None:
    """Compile. Raises StepError with what the compiler said last."""
    from buildsys.rules.mobilint.generations import generation_of

    generation = generation_of(step.toolchain["distribution"], step.toolchain["version"])
    work = step.out.parent / ".compile"
    work.mkdir()
    call = _prepared(step, generation, work)
    spin = SpinWeights(step, generation, work, call["mblt"])
    spin.clear()
    try:
        if step.options["interface"] == "python":
            _by_python(step, call, work)
        else:
            _by_command_line(step, call, work)
        _take_mxq(step, work)
        if "rotation" in step.outputs:
            spin.take(step.outputs["rotation"])
    finally:
        spin.clear()
    told = {name: call[name] for name in ("keywords", "activation_16bits", "transforms")}
    step.note("compiler", {name: step.toolchain[name] for name in ("distribution", "version")})
    step.note("call", told)
    given = step.maybe("rotation")
    if given is not None:
        step.note("rotation", given.digest)


def _prepared(step: StepContext, generation: Generation, work: Path) -> dict[str, Json]:
    """The request, with its inputs laid out in the working folder under names that depend on
    neither this machine nor this build."""
    from buildsys.formats.npy_set import absolute_list
    from buildsys.formats.rotation_file import load_rotation

    mblt, rotation = step.one("mblt"), step.maybe("rotation")
    if rotation is not None:
        load_rotation(rotation.path)  # what is no rotation is refused here, and by name
        (work / "head_rotation.pth").symlink_to(rotation.path.resolve())
    # Compilers before 1.1 write below /tmp, under the stem: no other build may have it too.
    stem = f"{mblt.path.stem}-{mblt.digest[:16]}"
    (work / f"{stem}.mblt").symlink_to(mblt.path.resolve())
    absolute_list(step.one("calibration").path, work / "npy_files.txt")
    path = None if rotation is None else "./head_rotation.pth"
    call = mxq_arguments.call_of(step.options, generation, step.device, path)
    return {
        **call,
        "nested": mxq_arguments.nested(call),
        "function_transforms": mxq_arguments.by_function_names(call["transforms"]),
        "mblt": f"{stem}.mblt",
        "save_path": "out.mxq",
        "calib_data_path": "npy_files.txt",
    }


def _by_python(step: StepContext, call: dict[str, Json], work: Path) -> None:
    from buildsys.rules.mobilint.in_compiler import mxq_call
    from buildsys.rules.mobilint.running import run_program

    run_program(step, mxq_call.__file__, call, work)


def _by_command_line(step: StepContext, call: dict[str, Json], work: Path) -> None:
    """`python -m qbcompiler quantize` with the same config as a file."""
    import json

    from buildsys.rules.mobilint.running import run

    keywords = call["keywords"]
    config = {**call["nested"], "inferenceScheme": keywords["inference_scheme"]}
    (work / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    arguments = {
        "--mblt": call["mblt"],
        "--output": call["save_path"],
        "--target-device": keywords["target_device"],
        "--calib-data-path": call["calib_data_path"],
        "--compile-config": "config.json",
        "--device": keywords["device"],
    }
    words = [word for pair in arguments.items() for word in pair]
    argv = [step.toolchain["python"], "-m", call["module"], "quantize", *words]
    run(step, argv, work, {"QBCOMPILER_JSONL": "1"})


def _take_mxq(step: StepContext, work: Path) -> None:
    made = work / "out.mxq"
    if not made.is_file() or made.stat().st_size == 0:
        raise StepError(f"{step.name}: the compiler ended well and wrote no mxq")
    made.rename(step.out)


class SpinWeights:
    """The folder into which the compiler writes rotations: spinWeight/STEM below a root that
    depends on its version. The stem is this step's own, so that nothing in it is another's."""

    def __init__(self, step: StepContext, generation: Generation, work: Path, mblt: str) -> None:
        self._step = step
        root = work / generation.rotation_root
        self._folder = root / "spinWeight" / mblt.removesuffix(".mblt")

    def clear(self) -> None:
        """Remove what an earlier run, killed before its end, has left."""
        import shutil

        if self._folder.is_dir():
            shutil.rmtree(self._folder)

    def take(self, target: Path) -> None:
        """Put the rotation at its place. Raises StepError where the compiler wrote none."""
        import shutil

        from blake3 import blake3

        from buildsys.formats.rotation_file import load_rotation

        made = self._folder / "R1" / "global_rotation.pth"
        if not made.is_file():
            raise StepError(
                f"{self._step.name}: the compiler wrote no rotation at {made}",
                remedy="Without it neither the vision mxq nor the embedding can be made. Another "
                "version may write it elsewhere: please report this.",
            )
        rotation = load_rotation(made)
        shutil.copyfile(made, target)
        digest = blake3(target.read_bytes()).hexdigest()
        self._step.note("rotation", {"digest": digest, "size": len(rotation.R)})
