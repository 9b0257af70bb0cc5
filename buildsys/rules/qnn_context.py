"""Rule `qnn-context`: a model's prefill and its vision encoder as QNN contexts for one SoC.

The graphs are written here, quantized with the recipe's own ranges and rotated weights, and
compiled on this machine by Qualcomm's compiler in onnxruntime-qnn. A context counts when what it
says of itself is what was planned, and when Qualcomm's emulator of HTP gives with it what our
own simulation of the quantized graph gives. docs/qnn-context.md has the contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from buildsys.rules.lineage import same_inputs
from buildsys.rules.model_inputs import RESCALE, ROTATION, digest_of, model_input, open_inputs
from buildsys.rules.qnn.targets import BY_ARCH, BY_SOC, target_of
from buildsys.rules.spec import InputSpec, Memory, OutputSpec, Problem, Rule, StepContext

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.models.samples import Sample
    from buildsys.plan.graph import Json, Plan, Step
    from buildsys.rules.qnn.making import Making
    from buildsys.rules.qnn.pieces import Cut


def check(step: Step, plan: Plan) -> Iterator[Problem]:
    """Everything was made with one rotation, the scales have the graphs' ranges, and the SoC has
    the arch."""
    yield from same_inputs(step, plan, "rotation", ["model"])
    yield from same_inputs(step, plan, "rescale", ["model", "rotation"])
    yield from same_inputs(step, plan, "scales", ["model", "rotation", "rescale"])
    for ref in step.inputs.get("scales", ()):
        maker = plan.steps.get(plan.producer.get(ref.name, ""))
        if maker is not None and maker.options.get("points") != "graph":
            yield Problem(
                f"{ref.name} has ranges of linears only; a graph needs those of all its tensors",
                f"Give {ref.name} the option `points: graph`.",
                input="scales",
            )
    arch, soc = step.options["arch"], step.options["soc"]
    if target_of(arch, soc) is None:
        yield Problem(
            f"{soc} has a Hexagon v{BY_SOC[soc].arch}, not v{arch}",
            f"Set `arch: {BY_SOC[soc].arch}`, or leave `soc` out.",
            option="soc",
        )
    # The graph merges 2 x 2 patches; other models' numbers are checked as the step runs.
    if step.options["patches"] % 4:
        yield Problem("patches are merged four by four", "Give a multiple of 4.", option="patches")


def _count(default: int, description: str) -> dict[str, Json]:
    return {"type": "integer", "minimum": 1, "default": default, "description": description}


RULE = Rule(
    name="qnn-context",
    doc="QNN context binaries of the language model's prefill and of the vision encoder, for one "
    "SoC: a folder with the contexts and io.json.",
    inputs={
        "model": model_input("config", "weights", "tokenizer", "processor"),
        "rotation": ROTATION,
        "rescale": RESCALE,
        "scales": InputSpec("Ranges, of rule activation-scales with `points: graph`."),
        "samples": InputSpec(
            "Text and images; the first of each source is run in the emulator, as the proof.",
            kinds=("text", "images"),
            many=True,
        ),
    },
    options={
        "arch": {
            "enum": sorted(BY_ARCH),
            "default": 75,
            "description": "Hexagon version of the SoC.",
        },
        "soc": {
            "enum": [None, *BY_SOC],
            "default": None,
            "description": "The SoC; null: the first of that arch (75: SM8650).",
        },
        "precision": {
            "enum": ["A16W8", "A8W8"],
            "default": "A16W8",
            "description": "Bits of activations and of weights. A8W8: what linears read and write "
            "has 8 bits, and the rest 16.",
        },
        "weights": {
            "enum": ["per-channel", "per-tensor"],
            "default": "per-channel",
            "description": "One scale for every row of a weight, or one for all.",
        },
        "chunk": _count(256, "Tokens of one run of the language model."),
        "past": {
            **_count(768, "Tokens of earlier chunks that a chunk can attend to; 0: none."),
            "minimum": 0,
        },
        "layers_per_graph": _count(4, "Layers of one context: fewer need less memory."),
        "vision": {
            "type": "boolean",
            "default": True,
            "description": "The vision encoder, too, where the model has one.",
        },
        "patches": _count(256, "Patches of an image at most; smaller images are padded."),
        "blocks_per_graph": {
            "type": ["integer", "null"],
            "minimum": 1,
            "default": None,
            "description": "Blocks of one context of the vision encoder; null: all.",
        },
        "least_sqnr": {
            "type": "number",
            "default": 20,
            "description": "dB between the emulator and our simulation below which a context is "
            "refused as wrong; gates on the metrics can ask for more.",
        },
    },
    outputs={"metrics": OutputSpec("Cosine and SQNR of every context.", "qnn_metrics.json")},
    distributions=("torch", "transformers", "tokenizers", "pillow", "numpy"),
    toolchain="onnxruntime-qnn",
    worker="python",
    folder=True,
    float_sums=True,
    # A whole vision encoder, or some layers, in float and in int8, and the compiler beside it.
    memory=Memory(largest=1.0, whole=1.0),
    check=check,
)


def make(step: StepContext) -> None:
    """Cut, compile and prove. Raises ModelError naming a tensor without a range, and StepError
    for a context that is not what was planned."""
    import json
    import shutil

    from buildsys.rules.qnn.contract import contract
    from buildsys.rules.qnn.dialogue import TOKENIZER, dialogue

    making = _open(step)
    variants = {}
    for done, piece in enumerate(making.pieces):
        step.progress(done, len(making.pieces), "graphs")
        variants[piece.name] = making.make(piece)
    step.progress(len(making.pieces), len(making.pieces), "graphs")
    content = {
        **contract(making.cut, making.pieces, making.target),
        **dialogue(making.cut, vision=any(piece.part == "vision" for piece in making.pieces)),
        "precision": step.options["precision"],
        "weights": step.options["weights"],
        "compiler": making.compiler,
        "made_with": _made_with(step),
    }
    shutil.copyfile(making.cut.model.folder / TOKENIZER, step.out / TOKENIZER)
    _write(step.out / "io.json", content)
    protocol = {
        "emulator": "onnxruntime-qnn on x86; each graph is given the float model's states",
        "samples": making.told_samples,
    }
    _write(step.outputs["metrics"], {"variants": variants, "protocol": protocol})
    step.note("compiler", json.dumps(making.compiler))


def _open(step: StepContext) -> Making:
    """The model cut into graphs, with the samples that they are proved on."""
    from buildsys.models.rotated import rotated_tensors
    from buildsys.models.scales import read_scales
    from buildsys.rules.qnn.making import Making
    from buildsys.rules.qnn.pieces import Cut, pieces_of

    model, rotations, rescale = open_inputs(step)
    scales = read_scales(step.one("scales").path)
    tensors = rotated_tensors(model, rotations, fold_all=True, rescale=rescale)
    options = step.options
    cut = Cut(
        model, frozenset(tensors.names()), options["chunk"], options["past"], options["patches"]
    )
    target = target_of(options["arch"], options["soc"])
    assert target is not None  # checked in the plan
    pieces = pieces_of(cut, scales.ranges, options)
    return Making(step, cut, target, pieces, tensors, _samples(step, cut))


def _samples(step: StepContext, cut: Cut) -> dict[str, Sample]:
    """The first sample of every source; of images only where the encoder is compiled."""
    from buildsys.models.samples import open_samples

    found = {}
    for given in step.inputs["samples"]:
        if given.kind == "images" and not step.options["vision"]:
            continue
        opened = open_samples(cut.model, given.kind, given.paths, given.options)
        found[given.name] = next(iter(opened))
    return found


def _made_with(step: StepContext) -> dict[str, Json]:
    return {name: digest_of(step, name) for name in ("model", "rotation", "rescale", "scales")}


def _write(path: Path, content: Json) -> None:
    import json

    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
