"""Rule `bmodel`: a language or vision-language model for Sophgo's TPUs, by TPU-MLIR.

The converter cuts the model into nets (a vision encoder, and for each layer one for prompts and
one for single tokens), compiles each by itself and joins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.model_inputs import model_input
from buildsys.rules.sophgo.options import SCHEMA, arguments, known_arguments, problems
from buildsys.rules.spec import ANY_FILE, InputSpec, Memory, OutputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.plan.graph import Plan, Step
    from buildsys.rules.sophgo.model_folder import Prepared


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """The options go together, and the weights are of this very model."""
    yield from problems(step.options, step.outputs)
    for ref in step.inputs.get("checkpoint", ()):
        maker = plan.steps.get(plan.producer.get(ref.name, "")) if ref.kind == "artifact" else None
        given = maker.inputs.get("model") if maker is not None else None
        if given is not None and given != step.inputs["model"]:
            yield Problem(
                f"{ref.name} is made from another model than the one that is compiled",
                input="checkpoint",
            )


RULE = Rule(
    name="bmodel",
    doc="A .bmodel for Sophgo's TPUs, from a model or from a checkpoint made of it.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "checkpoint": InputSpec(
            "Weights in place of the model's own, such as a rotated checkpoint; float32 is best.",
            kinds=ANY_FILE,
            required=False,
        ),
    },
    options=SCHEMA,
    outputs={
        "config": OutputSpec("A folder: config, tokenizer, processor, embedding.bin.", None),
        "info": OutputSpec("Nets, shapes and memory, as JSON.", None),
    },
    toolchain="tpu-mlir",
    worker="python",
    memory=Memory(whole=2.0),
    threads=2,
    check=check,
)


def make(step: StepContext) -> None:
    """Compile. Raises StepError with what the net that failed said."""
    import json

    from buildsys.formats.bmodel_file import read_bmodel, summary, without_accidents
    from buildsys.rules.sophgo.compiling import compile_model, made_bmodel, package_of
    from buildsys.rules.sophgo.kernels import drop_old_nets, net_store
    from buildsys.rules.sophgo.model_folder import prepare
    from buildsys.toolchains.installers.tpu_mlir_environment import CONVERTER

    version = step.toolchain["version"]
    known = known_arguments(package_of(step) / CONVERTER)
    words = arguments(step.options, known, version)
    work = step.out.parent / ".compile"
    work.mkdir()
    given = step.maybe("checkpoint")
    prepared = prepare(
        step.one("model").path,
        None if given is None else given.path,
        step.options["quantize"],
        work / "model",
        step.progress,
    )
    _check_image(step, prepared)
    check_groups(step, prepared)
    kept = net_store(step)
    nets = {
        "jobs": step.threads,
        "memory": step.memory,
        "kept": None if kept is None else str(kept),
        "salt": [version, _files_of(step)],
    }
    watch = compile_model(step, words, prepared.folder, work, nets)
    made = made_bmodel(step, work / "out")
    without_accidents(made)
    described = read_bmodel(made)
    made.rename(step.out)
    if "config" in step.outputs:
        (work / "out" / "config").rename(step.outputs["config"])
    if "info" in step.outputs:
        text = json.dumps(summary(described), indent=1) + "\n"
        step.outputs["info"].write_text(text, encoding="utf-8")
    if kept is not None:
        drop_old_nets(kept)
    step.note("compiler", {"name": "tpu_mlir", "version": version})
    step.note("arguments", words)
    step.note("nets", {"compiled": watch.done - len(watch.kept), "kept": len(watch.kept)})
    step.note("weights", {"stored": prepared.stored, "rewritten": prepared.rewritten})


def _check_image(step: StepContext, prepared: Prepared) -> None:
    """An image size where there is a vision encoder, and only there."""
    asked = step.options["max_pixels"] is not None
    if prepared.model_type == "qwen2_vl" and not asked:
        raise StepError(
            "the vision encoder is compiled for images of one size at most",
            remedy="Give `max_pixels: '672,896'`, for example: width and height in pixels.",
        )
    if asked and not prepared.has_vision:
        raise StepError(
            f"max_pixels is given, and a {prepared.model_type} sees no images",
            remedy="Leave max_pixels out.",
        )


def check_groups(step: StepContext, prepared: Prepared) -> None:
    """Groups of 4-bit weights fill the rows that they are of."""
    group = step.options["q_group_size"]
    if not step.options["quantize"].startswith("w4") or not group:
        return
    for name, width in prepared.widths.items():
        if width % group:
            raise StepError(
                f"q_group_size {group} does not divide the model's {name}, {width}",
                remedy="Take a power of two that does, such as 64 or 32; 0 is a whole row.",
            )


def _files_of(step: StepContext) -> str:
    """What tells one installation of the compiler from another of the same version."""
    from blake3 import blake3

    from buildsys.rules.sophgo.compiling import package_of

    root: Path = package_of(step).parent
    record = root / f"tpu_mlir-{step.toolchain['version']}.dist-info" / "RECORD"
    return blake3(record.read_bytes()).hexdigest() if record.is_file() else ""
