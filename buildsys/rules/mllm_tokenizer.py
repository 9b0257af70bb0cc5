"""Rule `mllm-tokenizer`: the vocabulary and merges files that mllm v1's tokenizers read."""

from __future__ import annotations

from buildsys.rules.spec import InputSpec, OutputSpec, Rule, StepContext

RULE = Rule(
    name="mllm-tokenizer",
    doc="mllm's vocabulary file (vocab.mllm) and, beside it, the BPE merges.",
    inputs={
        "model": InputSpec(
            "The model; its tokenizer.json must be BPE.",
            kinds=("model", "artifact", "folder"),
            parts=("tokenizer",),
        )
    },
    outputs={"merges": OutputSpec("The merges, one pair to a line.", "merges.txt")},
)


def make(step: StepContext) -> None:
    """Write both files. Raises FormatError for ids with holes and tokenizers that are not BPE."""
    from buildsys.formats.mllm_tokenizer import save_merges, save_vocabulary

    tokenizer = step.one("model").path / "tokenizer.json"
    step.note("tokens", save_vocabulary(step.out, tokenizer))
    step.note("merges", save_merges(step.outputs["merges"], tokenizer))
