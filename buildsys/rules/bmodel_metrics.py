"""Rule `bmodel-metrics`: how near a bmodel, run by the chip's simulator, is to float32.

The vision encoder, the prompt and a few tokens after it are run as a board runs them. Errors are
1 - cosine, 0 at best, so that gates hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.rules.model_inputs import model_input
from buildsys.rules.spec import ANY_FILE, InputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    import numpy

    from buildsys.plan.graph import Plan, Step
    from buildsys.rules.sophgo.reference import Reference


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """Something to run, and bmodels of this model."""
    if bool(step.inputs.get("text")) == bool(step.inputs.get("images")):
        yield Problem("one prompt is run", "Give `text` or `images`.")
    for ref in step.inputs.get("bmodels", ()):
        maker = plan.steps.get(plan.producer.get(ref.name, "")) if ref.kind == "artifact" else None
        if maker is None or maker.rule != "bmodel":
            continue
        for name in ("model", "checkpoint"):
            if maker.inputs.get(name, ()) != step.inputs.get(name, ()):
                yield Problem(
                    f"{ref.name} is made from another {name} than it is measured by",
                    "Give both the same.",
                    input="bmodels",
                )


RULE = Rule(
    name="bmodel-metrics",
    doc="How near bmodels are to float32, by the chip's simulator: cosines, tokens, memory.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "checkpoint": InputSpec(
            "The weights that the bmodels were made with, where they are not the model's own.",
            kinds=ANY_FILE,
            required=False,
        ),
        "bmodels": InputSpec("Artifacts of rule bmodel.", kinds=ANY_FILE, many=True),
        "images": InputSpec(
            "The first question about the first of these is run.", kinds=("images",), required=False
        ),
        "text": InputSpec("Its first tokens are run.", kinds=("text",), required=False),
    },
    options={
        "prompt_tokens": {
            "type": "integer",
            "minimum": 1,
            "default": 16,
            "description": "Tokens of the prompt that is taken from `text`.",
        },
        "steps": {
            "type": "integer",
            "minimum": 0,
            "default": 3,
            "description": "Tokens that are decoded after the prompt's own. A simulator computes "
            "a thousand times slower than the chip.",
        },
    },
    toolchain="tpu-mlir",
    distributions=("torch", "transformers", "tokenizers", "pillow", "numpy"),
    worker="python",
    float_sums=True,
    check=check,
)


def make(step: StepContext) -> None:
    """Run and compare. Raises StepError for a bmodel that does not run."""
    import json

    from buildsys.formats.bmodel_file import read_bmodel, summary
    from buildsys.models.open import open_model
    from buildsys.models.variant import open_variant
    from buildsys.rules.evaluate import rounded
    from buildsys.rules.sophgo.reference import prompt_of, run_reference
    from buildsys.rules.sophgo.simulating import request_of, simulate

    model = open_model(step.one("model").path)
    given = step.maybe("checkpoint")
    tensors = None if given is None else open_variant(given.path, model.family).tensors
    reference = run_reference(model, tensors, prompt_of(step, model), int(step.options["steps"]))
    rows: dict[str, Any] = {}
    models: dict[str, Any] = {}
    bmodels = step.inputs["bmodels"]
    for number, each in enumerate(bmodels):
        made = read_bmodel(each.path)
        work = step.out.parent / f".run-{number}"
        work.mkdir()

        def told(done: int, total: int, number: int = number) -> None:
            step.progress(number * total + done, len(bmodels) * total, "nets")

        result = simulate(step, made, request_of(model, made, reference), work, told)
        rows[each.name] = figures(reference, result)
        models[each.name] = summary(made)
    content = {"variants": rows, "bmodels": models, "protocol": _protocol(step, reference)}
    text = json.dumps(rounded(content), indent=2, sort_keys=True, ensure_ascii=False)
    step.out.write_text(text + "\n", encoding="utf-8")


def figures(reference: Reference, result: dict[str, Any]) -> dict[str, float]:
    """The figures of one bmodel, all smaller-is-better.

    vision_error: of the image's tokens, the worst. prompt_error and decode_error: of the hidden
    states that the head reads, the worst position; prompt_error_mean: of all. layer_error: the
    worst of any layer, over all positions. token_mismatch: the fraction of tokens that are others
    than float32's.
    """
    prompt = reference.prompt
    hidden = _errors(reference.layers[-1].numpy(), result[f"layer_{len(reference.layers) - 1}"])
    layers = [
        _errors(own.numpy().reshape(1, -1), result[f"layer_{index}"].reshape(1, -1))[0]
        for index, own in enumerate(reference.layers)
    ]
    wrong = (reference.tokens.numpy() != result["tokens"]).mean()
    row = {
        "prompt_error": float(hidden[:prompt].max()),
        "prompt_error_mean": float(hidden[:prompt].mean()),
        "layer_error": float(max(layers)),
        "token_mismatch": float(wrong),
    }
    if len(hidden) > prompt:
        row["decode_error"] = float(hidden[prompt:].max())
    if reference.vision is not None:
        row["vision_error"] = float(_errors(reference.vision.numpy(), result["vision"]).max())
    return row


def _errors(own: numpy.ndarray[Any, Any], made: numpy.ndarray[Any, Any]) -> Any:
    """1 - cosine of every row [rows, width]."""
    import numpy

    if own.shape != made.shape:
        raise StepError(f"the bmodel gives {list(made.shape)}, the model {list(own.shape)}")
    a, b = own.astype("f8"), made.astype("f8")
    lengths = numpy.linalg.norm(a, axis=1) * numpy.linalg.norm(b, axis=1)
    return 1 - (a * b).sum(axis=1) / lengths


def _protocol(step: StepContext, reference: Reference) -> dict[str, Any]:
    """What was run."""
    pixels = reference.sample.pixel_values
    return {
        "source": (step.maybe("images") or step.one("text")).name,
        "origin": reference.sample.origin,
        "prompt_tokens": reference.prompt,
        "decoded_tokens": len(reference.tokens) - 1,
        "patches": 0 if pixels is None else len(pixels),
        "tokens": reference.tokens.tolist(),
        "errors": "1 - cosine against the model in float32, of the worst position",
    }
