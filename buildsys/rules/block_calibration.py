"""Blocks of rule `mllm-quantize` that need to know what a linear reads: GPTQ and imatrix.

Layers run in the model's order and a .mllm is written in its own, so what a layer gives lies in
a folder until its turn: finished blocks for GPTQ, importances for the imatrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import StepError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from buildsys.formats.tensors import TensorSource
    from buildsys.quant.ggml_blocks import Bytes
    from buildsys.quant.tensor_types import Target
    from buildsys.rules.spec import StepContext

METHODS = ("gptq", "imatrix")


@dataclass(frozen=True)
class Calibrated:
    """By tensor: the file of its finished blocks, or its type and the importance of each of its
    columns."""

    blocks: Mapping[str, Path] = field(default_factory=dict)
    importances: Mapping[str, tuple[str, npt.NDArray[np.float32]]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.blocks or name in self.importances

    def make(self, name: str, values: npt.NDArray[np.float32], first: int) -> Bytes:
        """Blocks of the rows `values` of a tensor, which begin at row `first`."""
        import numpy as np

        from buildsys.quant.imatrix_blocks import imatrix_blocks

        if name in self.importances:
            kind, importance = self.importances[name]
            return imatrix_blocks(values, importance, kind, name=name)
        stored: Bytes = np.load(self.blocks[name], mmap_mode="r")
        return np.array(stored[first : first + len(values)]).reshape(-1)


def calibrate(
    step: StepContext, source: TensorSource, targets: Sequence[Target], folder: Path
) -> Calibrated:
    """Run the samples through the float model, and prepare every linear whose type has the
    method. Notes how many; raises StepError where none has."""
    import numpy as np

    from buildsys.models.linear_inputs import inputs_by_layer
    from buildsys.models.open import open_model
    from buildsys.models.samples import open_samples
    from buildsys.quant.calibrated_blocks import GPTQ_TYPES, gptq_blocks
    from buildsys.quant.imatrix_blocks import IMATRIX_TYPES

    model = open_model(step.one("model").path)
    samples = [
        open_samples(model, given.kind, given.paths, given.options)
        for given in step.inputs["samples"]
    ]
    gptq = step.options["calibration"] == "gptq"
    types = GPTQ_TYPES if gptq else IMATRIX_TYPES
    wanted = {target.source: target.type for target in targets if target.type in types}
    blocks: dict[str, Path] = {}
    importances: dict[str, tuple[str, npt.NDArray[np.float32]]] = {}
    (folder / "states").mkdir()
    for layer in inputs_by_layer(model, source, samples, folder / "states", step.progress):
        for linear, hessian in layer.items():
            name = f"{linear}.weight"
            if name not in wanted:
                continue
            if gptq:
                W = source.read(name).float()
                made = gptq_blocks(W, hessian.H, wanted[name], name=name)
                blocks[name] = folder / f"{name}.npy"
                np.save(blocks[name], made.reshape(len(W), -1))
                source.release(name)
            else:
                importances[name] = (wanted[name], hessian.mean_square.numpy())
    if not (blocks or importances):
        raise StepError(
            f"calibration: {step.options['calibration']} is for {', '.join(types)}, and no linear "
            "of the language model gets such a type",
            remedy="Choose another type, or leave calibration out.",
        )
    step.note("calibrated", len(blocks) + len(importances))
    return Calibrated(blocks, importances)
