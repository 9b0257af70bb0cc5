"""Rule `mblt`: one half of a Qwen2-VL as Mobilint's intermediate format.

The compiler traces the model over one real prompt. qbuild makes that prompt's tensors itself,
so that the compiler's Python needs neither processor nor torchvision, and gives them to the
parser of whichever version is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.errors import StepError
from buildsys.rules.model_inputs import model_input
from buildsys.rules.spec import InputSpec, Memory, OutputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.models.open import Model
    from buildsys.plan.graph import Json, Plan, Step
    from buildsys.rules.mobilint.generations import Generation

COMPARED = ("infer", "comparison")


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """The comparison comes with the values that it was made from."""
    declared = [name for name in COMPARED if name in step.outputs]
    if len(declared) == 1:
        other = next(name for name in COMPARED if name not in declared)
        yield Problem(
            f"output '{declared[0]}' comes with output '{other}'", f"Name '{other}' as well."
        )


RULE = Rule(
    name="mblt",
    doc="A .mblt: one half of a Qwen2-VL as Mobilint's compiler reads it.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "sample": InputSpec(
            "An image, the first of these, over which the model is traced.",
            kinds=("images", "artifact", "folder"),
        ),
    },
    options={
        "part": {"enum": ["language", "vision"], "description": "Which half of the model."},
        "prompt": {
            "type": "string",
            "default": "Describe this image in detail, as a document.",
            "description": "What is asked of the image, where its source has no prompts.",
        },
        "size": {
            "type": ["array", "null"],
            "items": {"type": "integer", "minimum": 1},
            "minItems": 2,
            "maxItems": 2,
            "default": None,
            "description": "Height and width of the image; null: the source's, else the "
            "processor's rule. A vision encoder is fixed to this size.",
        },
        "target_device": {
            "enum": ["aries-rb", "regulus-ra", "regulus-rb", "regulus-rb-usb"],
            "default": "aries-rb",
            "description": "The NPU; compilers before 1.2 know ARIES alone, as aries2.",
        },
        "method": {
            "enum": [None, "parser", "mblt_compile"],
            "default": None,
            "description": "By ModelParser, which also compares, or by mblt_compile (1.2 and "
            "later); null: what that version's tutorial does.",
        },
        "blocks": {
            "type": ["integer", "null"],
            "minimum": 1,
            "default": None,
            "description": "Only the first decoder layers, to try things out.",
        },
    },
    outputs={
        "infer": OutputSpec("Values of all layers for the sample.", None),
        "comparison": OutputSpec("How near they are to the original model's, as JSON.", None),
    },
    toolchain="mobilint-compiler",
    distributions=("torch", "transformers", "tokenizers", "pillow"),
    worker="python",
    memory=Memory(whole=2.0),
    check=check,
)


def make(step: StepContext) -> None:
    """Trace and write. Raises StepError with what the compiler said last."""
    from buildsys.models.open import open_model
    from buildsys.rules.mobilint.generations import generation_of
    from buildsys.rules.mobilint.in_compiler import mblt_call
    from buildsys.rules.mobilint.running import run_program

    generation = generation_of(step.toolchain["distribution"], step.toolchain["version"])
    method = _method(step, generation)
    model = open_model(step.one("model").path)
    work = step.out.parent / ".parse"
    work.mkdir()
    _write_sample(step, model, work / "inputs.safetensors")
    compared = "infer" in step.outputs
    request: dict[str, Json] = {
        "model": str(model.folder.resolve()),
        "part": step.options["part"],
        "inputs": "inputs.safetensors",
        "image_token": model.config.image_token_id,
        "layers": model.config.num_hidden_layers,
        "module": generation.module,
        "model_dict": generation.model_dict,
        "wrapper": generation.wrapper,
        "method": method,
        "target_device": _target(step, generation),
        "device": step.device,
        "blocks": step.options["blocks"],
        "save_path": "out.mblt",
        "infer": "out.infer" if compared else None,
        "comparison": "out.json" if compared else None,
    }
    run_program(step, mblt_call.__file__, request, work)
    _take(step, work / "out.mblt", step.out)
    if compared:
        _take(step, work / "out.infer", step.outputs["infer"])
        _take(step, work / "out.json", step.outputs["comparison"])
    step.note("compiler", {name: step.toolchain[name] for name in ("distribution", "version")})
    step.note("method", method)


def _method(step: StepContext, generation: Generation) -> str:
    asked = step.options["method"]
    if asked == "mblt_compile" and not generation.mblt_compile:
        raise StepError(
            f"{step.name}: {generation.module} {step.toolchain['version']} has no mblt_compile",
            remedy="It came with qbcompiler 1.2; give `method: parser`.",
        )
    method: str = asked or ("mblt_compile" if generation.mblt_compile else "parser")
    if method == "mblt_compile" and "infer" in step.outputs:
        raise StepError(
            f"{step.name}: mblt_compile writes no comparison",
            remedy="Give `method: parser`, or remove the outputs infer and comparison.",
        )
    return method


def _target(step: StepContext, generation: Generation) -> str:
    wanted = str(step.options["target_device"])
    if generation.target:
        return wanted
    if wanted != "aries-rb":
        version = step.toolchain["version"]
        raise StepError(f"{step.name}: {generation.module} {version} knows ARIES alone")
    return generation.parser_target


def _write_sample(step: StepContext, model: Model, target: Path) -> None:
    """The tensors of one prompt: input_ids, pixel_values, image_grid_thw."""
    from dataclasses import replace

    from safetensors.torch import save_file

    from buildsys.models.image_samples import image_samples

    given = step.one("sample")
    samples = image_samples(
        model,
        given.path,
        prompts=given.paths.get("prompts"),
        samples=1,
        size=step.options["size"] or given.options.get("size"),
        seed=given.options.get("seed"),
    )
    question = samples.questions[0]
    if "prompts" not in given.paths:
        question = replace(question, prompt=step.options["prompt"])
    sample = samples.sample(question)
    assert sample.pixel_values is not None
    assert sample.image_grid_thw is not None
    tensors = {
        "input_ids": sample.input_ids,
        "pixel_values": sample.pixel_values.contiguous(),
        "image_grid_thw": sample.image_grid_thw,
    }
    save_file(tensors, target)


def _take(step: StepContext, made: Path, target: Path) -> None:
    if not made.is_file() or made.stat().st_size == 0:
        raise StepError(f"{step.name}: the compiler ended well and wrote no {target.name}")
    made.rename(target)
