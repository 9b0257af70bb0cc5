"""Names of tensors and modules: the classic ones, and those of transformers 5.

Every artifact uses the classic keys (`model.*`, `visual.*`, `lm_head.*`), whatever
transformers calls its modules today (`model.language_model.*`, `model.visual.*`).
"""

from __future__ import annotations

_LANGUAGE, _VISION = "model.language_model.", "model.visual."


def to_classic(name: str) -> str:
    """The classic name of a tensor or module.

    >>> to_classic("model.language_model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> to_classic("model.visual.merger.mlp.0"), to_classic("lm_head.weight")
    ('visual.merger.mlp.0', 'lm_head.weight')
    """
    if name.startswith(_LANGUAGE):
        return "model." + name.removeprefix(_LANGUAGE)
    if name.startswith(_VISION):
        return "visual." + name.removeprefix(_VISION)
    return name


def to_transformers(name: str, multimodal: bool) -> str:
    """The name in transformers 5; text-only models keep the classic one.

    >>> to_transformers("visual.merger.mlp.0", True), to_transformers("model.norm.weight", True)
    ('model.visual.merger.mlp.0', 'model.language_model.norm.weight')
    >>> to_transformers("model.norm.weight", False)
    'model.norm.weight'
    """
    if multimodal and name.startswith("visual."):
        return "model." + name
    if multimodal and name.startswith("model."):
        return _LANGUAGE + name.removeprefix("model.")
    return name
