"""Rule `import-gguf`: a GGUF of a Llama or a Qwen2 as a Qwen2 checkpoint in float32."""

from __future__ import annotations

from collections import Counter

from buildsys.rules.spec import ANY_FILE, InputSpec, Rule, StepContext

RULE = Rule(
    name="import-gguf",
    doc="A Qwen2 checkpoint folder (config.json, model.safetensors in float32, tokenizer.json, "
    "tokenizer_config.json) from a GGUF of architecture llama or qwen2.",
    inputs={"gguf": InputSpec("The GGUF file.", kinds=ANY_FILE)},
    distributions=("gguf", "torch", "tokenizers"),
    worker="python",
    folder=True,
)


def make(step: StepContext) -> None:
    """Write the folder. Raises FormatError naming the tensor or the metadata field."""
    import json

    import torch

    from buildsys.formats.checkpoint import check_finite
    from buildsys.formats.config_file import ConfigFile
    from buildsys.formats.gguf_file import GGUFSource
    from buildsys.formats.safetensors_file import SafetensorsWriter
    from buildsys.formats.tensors import TensorEntry
    from buildsys.models import from_gguf
    from buildsys.models.config import normalise
    from buildsys.models.open import describe

    source = GGUFSource(step.one("gguf").path)
    config = from_gguf.config_of(source)
    family = describe(normalise(ConfigFile(source.path, config)))
    stored = from_gguf.checkpoint_names(source)
    from_gguf.check_shapes(source, stored, family)
    step.out.mkdir(exist_ok=True)
    (step.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = from_gguf.tokenizer_of(source)
    (step.out / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    tokenizer_config = from_gguf.tokenizer_config_of(source)
    (step.out / "tokenizer_config.json").write_text(tokenizer_config, encoding="utf-8")

    # Sorted, as the safetensors library writes them.
    names = sorted(name for name in family.shapes if name in stored or name.endswith(".bias"))
    entries = [TensorEntry(name, torch.float32, family.shapes[name]) for name in names]
    weights = step.out / "model.safetensors"
    with SafetensorsWriter(weights, entries, {"format": "pt"}) as writer:
        for done, name in enumerate(names):
            step.progress(done, len(names), "tensors")
            if name not in stored:
                writer.write(name, torch.zeros(family.shapes[name]))
                continue
            order = from_gguf.head_order(name, config, source)
            for part in from_gguf.parts_of(source, stored[name], order):
                check_finite(stored[name], part, file=source.path)
                writer.write_part(name, part)
    step.progress(len(names), len(names), "tensors")
    step.note("architecture", source.metadata["general.architecture"])
    types = Counter(source.stored_type(name) for name in source.names())
    step.note("types", dict(sorted(types.items())))
