"""Synthetic pictures: a 3x3 grid of coloured shapes of three sizes, with distractors.

Every picture is a pure function of a numpy generator, so a seed names a picture for good.
Drawing is plain numpy on integer pixels: no anti-aliasing, no library whose next version
could draw another circle.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID = 3
CELL = 56
SIDE = GRID * CELL
EMPTY_RATE = 0.25

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SIZES = ("small", "medium", "large")
COLORS = {
    "red": (215, 40, 40),
    "green": (45, 175, 60),
    "blue": (50, 85, 225),
    "yellow": (235, 220, 60),
    "purple": (155, 60, 195),
    "cyan": (60, 210, 220),
    "orange": (240, 135, 30),
    "white": (230, 230, 230),
}
POSITIONS = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
# Half extents in pixels, both ends included. The gaps keep the sizes apart; the spread keeps
# a size from being one number.
_EXTENTS = {"small": (8, 10), "medium": (13, 15), "large": (19, 22)}

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Shape:
    """One shape of a picture, by its names."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Nine cells in reading order; None is an empty cell."""

    cells: tuple[Shape | None, ...]

    def shapes(self) -> list[Shape]:
        """The shapes that are there, in reading order."""
        return [cell for cell in self.cells if cell is not None]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: each cell empty at EMPTY_RATE, else a uniform shape, colour and size.

    Half of the scenes use few colours and kinds, so that counts above one are common.
    """
    colors, kinds = list(COLORS), list(SHAPES)
    if rng.random() < 0.5:
        colors = list(rng.permutation(colors)[:3])
        kinds = list(rng.permutation(kinds)[:3])

    def cell() -> Shape | None:
        if rng.random() < EMPTY_RATE:
            return None
        return Shape(
            SIZES[rng.integers(len(SIZES))],
            str(colors[rng.integers(len(colors))]),
            str(kinds[rng.integers(len(kinds))]),
        )

    return Scene(tuple(cell() for _ in POSITIONS))


def _shape_mask(kind: str, r: int, cx: int, cy: int) -> Mask:
    """Pixels of a cell that belong to a shape of half extent r at (cx, cy)."""
    y, x = np.ogrid[0:CELL, 0:CELL]
    dx, dy = x - cx, y - cy
    box: Mask = (abs(dx) <= r) & (abs(dy) <= r)
    if kind == "square":
        return box
    if kind == "circle":
        return np.asarray(dx * dx + dy * dy <= r * r)
    if kind == "ring":
        d2 = dx * dx + dy * dy
        inner = r - max(3, r // 3)
        return np.asarray((d2 <= r * r) & (d2 >= inner * inner))
    if kind == "diamond":
        return np.asarray(abs(dx) + abs(dy) <= r)
    if kind == "triangle":
        return box & np.asarray(2 * abs(dx) <= dy + r)
    arm = max(2, r // 4)
    return box & np.asarray((abs(dx) <= arm) | (abs(dy) <= arm))


def _ground(rng: np.random.Generator) -> NDArray[np.int16]:
    """Dark ground with a slope, grey noise in 2x2 blocks (small as a PNG), and faint grid lines.

    The lines lie between cells only, so the lines around a cell tell where it is.
    """
    slope = rng.integers(-12, 13, size=2)
    ramp = np.linspace(-1.0, 1.0, SIDE)
    light = 30 + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    noise = rng.integers(-2, 3, size=(SIDE // 2, SIDE // 2)).repeat(2, 0).repeat(2, 1) * 5
    grey = light + noise
    for edge in range(CELL, SIDE, CELL):
        grey[edge - 1 : edge + 1, :] += 22
        grey[:, edge - 1 : edge + 1] += 22
    tint = rng.integers(-8, 9, size=3)
    return np.asarray(grey[:, :, None] + tint, dtype=np.int16)


def _distract(image: NDArray[np.int16], rng: np.random.Generator) -> None:
    """Draw grey strokes across the picture and coloured specks: things to be ignored."""
    for _ in range(rng.integers(2, 5)):
        ends = rng.integers(0, SIDE, size=4)
        steps = np.linspace(0.0, 1.0, 2 * SIDE)
        ys = np.rint(ends[0] + (ends[1] - ends[0]) * steps).astype(np.intp)
        xs = np.rint(ends[2] + (ends[3] - ends[2]) * steps).astype(np.intp)
        image[ys, xs] = rng.integers(70, 130)
    palette = np.array(list(COLORS.values()))
    for _ in range(rng.integers(6, 13)):
        y, x = rng.integers(0, SIDE - 3, size=2)
        extent = rng.integers(2, 4)
        image[y : y + extent, x : x + extent] = palette[rng.integers(len(palette))]


def render(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Draw a scene. uint8 [SIDE, SIDE, 3], RGB."""
    image = _ground(rng)
    _distract(image, rng)
    for index, item in enumerate(scene.cells):
        if item is None:
            continue
        low, high = _EXTENTS[item.size]
        r = int(rng.integers(low, high + 1))
        room = CELL // 2 - r - 2
        cx, cy = (CELL // 2 + rng.integers(-room, room + 1, size=2)).tolist()
        color = np.array(COLORS[item.color]) + rng.integers(-14, 15, size=3)
        top, left = CELL * (index // GRID), CELL * (index % GRID)
        cell = image[top : top + CELL, left : left + CELL]
        cell[_shape_mask(item.shape, r, cx, cy)] = color
    return np.clip(image, 0, 255).astype(np.uint8)
