"""Blocks of rule `mllm-quantize` that need to know what a linear reads: GPTQ and imatrix.

Layers run in the model's order and a .mllm is written in its own, so what a layer gives lies in
a folder until its turn: finished blocks for GPTQ, importances for the imatrix. The folder
outlives a kill, and what it holds of finished layers is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from buildsys.formats.tensors import TensorSource
    from buildsys.models.open import Model
    from buildsys.quant.ggml_blocks import Bytes
    from buildsys.quant.gptq import Hessian
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
    method. folder: keeps what is made, over a kill too. Notes how many; raises StepError where
    there is none, and ModelError, before the work, where the step's `memory` cannot hold GPTQ."""
    import numpy as np

    from buildsys.models.open import open_model

    model = open_model(step.one("model").path)
    kinds = _kinds(step, model, targets)
    if step.options["calibration"] == "gptq":
        _round(step, model, source, kinds, folder)
        made = Calibrated(blocks={name: _file(folder, name) for name in kinds})
    else:
        _weigh(step, model, source, kinds, folder)
        importances = {name: (kind, np.load(_file(folder, name))) for name, kind in kinds.items()}
        made = Calibrated(importances=importances)
    step.note("calibrated", len(kinds))
    return made


def _kinds(step: StepContext, model: Model, targets: Sequence[Target]) -> dict[str, str]:
    """Tensor -> type of the linears that the method is for."""
    from buildsys.models.linear_inputs import linears_of_layers
    from buildsys.quant.calibrated_blocks import GPTQ_TYPES
    from buildsys.quant.imatrix_blocks import IMATRIX_TYPES

    method = step.options["calibration"]
    types = GPTQ_TYPES if method == "gptq" else IMATRIX_TYPES
    linears = {f"{linear.name}.weight" for linear in linears_of_layers(model.family)}
    kinds = {
        target.source: target.type
        for target in targets
        if target.type in types and target.source in linears
    }
    if not kinds:
        raise StepError(
            f"calibration: {method} is for {', '.join(types)}, and no linear of the language "
            "model gets such a type",
            remedy="Choose another type, or leave calibration out.",
        )
    return kinds


def _round(
    step: StepContext, model: Model, source: TensorSource, kinds: Mapping[str, str], folder: Path
) -> None:
    """Blocks [rows, bytes] of every tensor, rounded by GPTQ, into its file."""
    from buildsys.models.hessian_memory import check_limit, limit_of
    from buildsys.models.linear_inputs import inputs_by_layer
    from buildsys.quant.gptq import Hessian
    from buildsys.rules.activation_scales import open_step_samples

    limit, linears = limit_of(model.family, step.memory), _linears(kinds)
    check_limit(model.family, linears, limit)
    for part in inputs_by_layer(
        model,
        source,
        open_step_samples(step, model),
        folder,
        Hessian,
        wanted=linears,
        limit=limit,
        progress=step.progress,
    ):
        _round_part(source, part, kinds, folder)


def _round_part(
    source: TensorSource, part: Mapping[str, Hessian], kinds: Mapping[str, str], folder: Path
) -> None:
    from buildsys.quant.calibrated_blocks import gptq_blocks

    for linear, hessian in part.items():
        name = f"{linear}.weight"
        W = source.read(name).float()
        made = gptq_blocks(W, hessian.H, kinds[name], name=name)
        _keep(folder, name, made.reshape(len(W), -1))
        source.release(name)


def _weigh(
    step: StepContext, model: Model, source: TensorSource, kinds: Mapping[str, str], folder: Path
) -> None:
    """The importances of every tensor's columns, into its file."""
    from buildsys.models.linear_inputs import inputs_by_layer
    from buildsys.quant.importance import MeanSquare
    from buildsys.rules.activation_scales import open_step_samples

    for layer in inputs_by_layer(
        model,
        source,
        open_step_samples(step, model),
        folder,
        MeanSquare,
        wanted=_linears(kinds),
        progress=step.progress,
    ):
        for linear, squares in layer.items():
            _keep(folder, f"{linear}.weight", squares.value.numpy())


def _linears(kinds: Mapping[str, str]) -> list[str]:
    return [name.removesuffix(".weight") for name in kinds]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _keep(folder: Path, name: str, values: npt.NDArray[Any]) -> None:
    """Complete on disk before the states behind the layer are."""
    import numpy as np

    with _file(folder, name).open("wb") as stream:
        np.save(stream, values)
        stream.flush()
        os.fsync(stream.fileno())
