"""Makes the contexts one after the other, and proves each before it is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import StepError
from buildsys.formats.qnn_binary import LIBRARY, QnnBinary, read_qnn_binary
from buildsys.models.graph.weights import LinearWeights
from buildsys.models.layerwise import LayerwiseModel
from buildsys.rules.qnn.compiling import compile_graph, emulate
from buildsys.rules.qnn.contract import differences
from buildsys.rules.qnn.figures import graph_figures
from buildsys.rules.qnn.probes import Probe, VisionProbe, language_probes, vision_probes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from buildsys.formats.tensors import TensorSource
    from buildsys.models.samples import Sample
    from buildsys.rules.qnn.pieces import Cut, Piece
    from buildsys.rules.qnn.targets import Target
    from buildsys.rules.spec import StepContext


@dataclass
class Making:
    """The step's state between two graphs: where every sample stands, and what the compiler
    said of itself. Pieces are made in their order, each once."""

    step: StepContext
    cut: Cut
    target: Target
    pieces: tuple[Piece, ...]
    tensors: TensorSource
    samples: Mapping[str, Sample]
    compiler: dict[str, str] = field(default_factory=dict)
    _vision: list[VisionProbe] = field(default_factory=list)
    _language: list[Probe] | None = None

    def __post_init__(self) -> None:
        self._weights = LinearWeights(self.tensors)
        self._work = self.step.out.parent / ".qnn"
        self._work.mkdir()
        self.step.out.mkdir(exist_ok=True)
        if any(piece.part == "vision" for piece in self.pieces):
            self._vision = vision_probes(list(self.samples.values()))

    @property
    def told_samples(self) -> list[str]:
        """Which samples were run."""
        return [f"{source}: {sample.origin}" for source, sample in self.samples.items()]

    def make(self, piece: Piece) -> dict[str, Any]:
        """Compile, read back, run and compare one graph; its figures. Raises StepError."""
        from buildsys.rules.evaluate import rounded

        step, quantized = self.step, piece.quantized
        context, binary = compile_graph(step, quantized, self._weights, self.target, self._work)
        self._check(piece, binary)
        runs = [
            run
            for probe in self._probes(piece)
            for run in probe.runs(piece, self.cut, self._weights)
        ]
        if not runs:
            raise StepError(
                f"{step.name}: no sample reaches {piece.name}, which would count unproved",
                remedy="Give samples with images, or set vision: false.",
            )
        feeds = [run.feeds for run in runs]
        emulated = emulate(step, quantized, context, self.target, feeds)
        simulated = [quantized.simulate(given, self._weights) for given in feeds]
        figures = graph_figures(runs, emulated, simulated)
        self._refuse_wrong(piece, figures)
        figures["bytes"] = binary.stat().st_size
        for file in (context, binary):
            file.rename(step.out / file.name)
        self._weights.clear()
        step.log.info("%s: %s", piece.name, rounded(figures))
        made: dict[str, Any] = rounded(figures)
        return made

    def _check(self, piece: Piece, file: Path) -> None:
        binary = read_qnn_binary(file, Path(self.step.toolchain["root"]) / LIBRARY)
        wrong = list(differences(piece, binary, self.target))
        if wrong:
            told = "\n".join(f"  {each}" for each in wrong)
            raise StepError(
                f"{self.step.name}: the compiler wrote another {file.name} than planned:\n{told}",
                remedy="Please report this with the version of onnxruntime-qnn.",
            )
        self.compiler = _versions(self.step, binary)

    def _refuse_wrong(self, piece: Piece, figures: Mapping[str, Any]) -> None:
        sqnr, least = figures["simulation_sqnr"], self.step.options["least_sqnr"]
        if math.isnan(sqnr) or sqnr < least:
            raise StepError(
                f"{self.step.name}: {piece.name} is {sqnr:.1f} dB from our simulation of it, and "
                f"{least} dB are asked for: the compiled graph computes something else",
                remedy="Ranges of another model, or a fault of the compiler; with 8-bit "
                "activations, lower `least_sqnr`.",
            )

    def _probes(self, piece: Piece) -> list[Probe]:
        if piece.part == "vision":
            return list(self._vision)
        if self._language is None:
            self._language = list(self._language_probes())
        return self._language

    def _language_probes(self) -> Iterator[Probe]:
        """The samples as the language model gets them: with what the vision encoder, in float,
        made of their images."""
        import torch

        layerwise = LayerwiseModel(self.cut.model, self.tensors)
        samples, images = list(self.samples.values()), iter(self._vision)
        hidden = self.cut.model.config.hidden_size
        tokens: list[Tensor] = []
        for sample in samples:
            probe = next(images) if sample.pixel_values is not None else None
            tokens.append(torch.empty(0, hidden) if probe is None else probe.hidden)
        yield from language_probes(self.cut, layerwise, samples, iter(tokens))


def _versions(step: StepContext, binary: QnnBinary) -> dict[str, str]:
    return {
        "onnxruntime-qnn": step.toolchain["version"],
        "build": binary.build,
        "core_api": binary.core_api,
        "backend_api": binary.backend_api,
        "blob": binary.blob,
    }
