"""What every model family is described with: plain frozen data, no tensors.

A rotation x -> x R of the residual stream changes no output when every weight that reads the
stream takes R on its input axis and every weight that writes it takes R on its output axis
(QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). A `Turn` says which matrix acts on
which part of an axis; the rest of the package follows these descriptions and names no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

# The names that rotation.bin uses: R1 of the residual stream, R2 per layer and head, and the
# same two of the vision transformer.
Matrix = Literal["R", "R_v", "R_vit", "R_vs_vit"]
Tower = Literal["language", "vision"]
Kind = Literal[
    "q", "k", "v", "o", "gate", "up", "down", "head",
    "qkv", "proj", "fc1", "fc2", "vit_gate", "vit_up", "vit_down",
    "merger_fc1", "merger_fc2", "patch_embed",
]  # fmt: skip
NOT_QUANTIZED: frozenset[Kind] = frozenset({"head", "merger_fc1", "merger_fc2", "patch_embed"})
HEAD_MATRICES: frozenset[Matrix] = frozenset({"R_v", "R_vs_vit"})
VISION_MATRICES: frozenset[Matrix] = frozenset({"R_vit", "R_vs_vit"})


@dataclass(frozen=True)
class Turn:
    """blockdiag(M, ..., M) acting on `blocks` equal blocks of an axis from index `start` on.

    index: which M of a per-layer list; 0 for a single matrix.
    """

    matrix: Matrix
    index: int = 0
    blocks: int = 1
    start: int = 0


@dataclass(frozen=True)
class Norm:
    """A norm with `size` features.

    bias: it is a LayerNorm (centres, and has a bias). foldable: linears read what it writes,
    and can take its gain.
    """

    name: str
    tower: Tower
    size: int
    bias: bool = False
    foldable: bool = True


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b, with W `shape` ([out, in], or a convolution that is one when flattened).

    norm: the norm whose output it reads, `norm_repeats` times side by side; its gain and bias
        can be folded into this linear.
    centred: it writes a residual stream that LayerNorms read, so its output may be centred.
    layer: its index within its tower; None outside the layers.
    """

    name: str
    kind: Kind
    tower: Tower
    shape: tuple[int, ...]
    bias: bool
    layer: int | None = None
    norm: str | None = None
    norm_repeats: int = 1
    input_turn: Turn | None = None
    output_turn: Turn | None = None
    centred: bool = False

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        return f"{self.name}.bias"

    @property
    def reads_heads(self) -> bool:
        """Is its input the attention heads' outputs, rather than a residual stream?"""
        return self.input_turn is not None and self.input_turn.matrix in HEAD_MATRICES

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) > 2

    @property
    def quantized(self) -> bool:
        """Does static int8 quantize it (heads, mergers and convolutions stay float)?"""
        return self.kind not in NOT_QUANTIZED

    @property
    def observed(self) -> bool:
        """Do activation scales list it (every nn.Linear, whether quantized or not)?"""
        return not self.is_convolution


@dataclass(frozen=True)
class Embedding:
    """A table [rows, columns] whose rows enter the residual stream."""

    name: str
    rows: int
    columns: int
    turn: Turn

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Family:
    """A whole model. `modules` stands in the order of mllm's state dict, the head last.

    tied: the head's weight is the embedding's until rotation or quantization separates them.
    groups: linears that read the same tensor, which is observed once and has one scale.
    """

    model_type: str
    modules: tuple[Embedding | Linear | Norm, ...]
    groups: tuple[tuple[str, ...], ...]
    tied: bool

    @cached_property
    def linears(self) -> dict[str, Linear]:
        return {m.name: m for m in self.modules if isinstance(m, Linear)}

    @cached_property
    def norms(self) -> dict[str, Norm]:
        return {m.name: m for m in self.modules if isinstance(m, Norm)}

    @cached_property
    def embedding(self) -> Embedding:
        return next(m for m in self.modules if isinstance(m, Embedding))

    @cached_property
    def head(self) -> Linear:
        return next(m for m in self.linears.values() if m.kind == "head")

    @cached_property
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """Linear -> all linears that read the same input, itself included."""
        found: dict[str, tuple[str, ...]] = {name: (name,) for name in self.linears}
        found.update({name: group for group in self.groups for name in group})
        return found

    @cached_property
    def up_down_pairs(self) -> tuple[tuple[Linear, Linear], ...]:
        """(up, down) of every layer: down is linear in what up writes."""
        ups = {linear.layer: linear for linear in self.linears.values() if linear.kind == "up"}
        downs = [linear for linear in self.linears.values() if linear.kind == "down"]
        return tuple((ups[down.layer], down) for down in downs)

    @cached_property
    def matrices(self) -> dict[Matrix, tuple[int, int]]:
        """Every rotation matrix that acts on this family -> (its size, how many there are)."""
        found: dict[Matrix, tuple[int, int]] = {}
        for turn, width in self._turns():
            _, count = found.get(turn.matrix, (0, 0))
            size = (width - turn.start) // turn.blocks
            found[turn.matrix] = (size, max(count, turn.index + 1))
        return found

    def _turns(self) -> Iterator[tuple[Turn, int]]:
        """Every turn, with the length of the axis that it acts on."""
        yield self.embedding.turn, self.embedding.columns
        for linear in self.linears.values():
            if linear.input_turn is not None:
                yield linear.input_turn, linear.shape[1]
            if linear.output_turn is not None:
                yield linear.output_turn, linear.shape[0]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, in state-dict order and with the head apart, -> its shape."""
        return dict(shape for module in self.modules for shape in _shapes(module))


def _shapes(module: Embedding | Linear | Norm) -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(module, Embedding):
        yield module.weight_name, (module.rows, module.columns)
        return
    shape = module.shape if isinstance(module, Linear) else (module.size,)
    yield f"{module.name}.weight", shape
    if module.bias:
        yield f"{module.name}.bias", shape[:1]
