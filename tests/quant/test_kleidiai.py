"""KleidiAI's packed int4: its own packing function's bytes, and the numbers that they stand for.

The golden file was made by `kai_run_rhs_pack_nxk_qsi4c32p_qsu4c32s1s0`, compiled from KleidiAI's
source on x86, from the levels and scales of `quantize`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from buildsys.formats.mllm_quant_config import KAI_TILES
from buildsys.quant.kleidiai import TILES, Tile, pack, packed_size, quantize

GOLDEN = Path(__file__).parents[1] / "golden" / "quant" / "kleidiai.npz"


@pytest.mark.parametrize("tile", sorted(set(TILES.values()), key=str))
def test_bytes_are_those_of_kleidiai(tile: Tile) -> None:
    with np.load(GOLDEN) as golden:
        found = pack(golden["W"], golden["bias"], tile)
        expected = golden[f"packed_{tile.nr}_{tile.kr}_{tile.sr}"]
    assert len(found) == packed_size(21, 96, tile)
    np.testing.assert_array_equal(found, expected)


def test_every_kernel_that_a_config_may_name_has_its_tile() -> None:
    assert set(KAI_TILES) == set(TILES)


def test_parts_of_whole_panels_are_the_whole() -> None:
    W = np.random.default_rng(0).standard_normal((29, 64), dtype=np.float32)
    tile = Tile(8, 16, 2)
    parts = [pack(W[:16], None, tile), pack(W[16:], None, tile)]
    np.testing.assert_array_equal(np.concatenate(parts), pack(W, None, tile))


def test_levels_and_scales_stand_for_the_weights() -> None:
    W = np.random.default_rng(1).standard_normal((16, 128), dtype=np.float32)
    W[0, :32], W[1, 0] = 0, 100
    q, scales = quantize(W)
    decoded = (q * scales[:, :, None]).reshape(W.shape)
    largest = np.abs(W.reshape(16, 4, 32)).max(axis=2).repeat(32, axis=1)
    assert (np.abs(decoded - W) <= largest / 8 * 1.01 + 1e-7).all()
    assert (scales.view(np.uint32) & 0xFFFF == 0).all()
    assert q[1, 0, 0] == -8


def test_weight_of_largest_magnitude_is_the_lowest_level_and_halves_leave_zero() -> None:
    W = np.zeros((1, 32), dtype=np.float32)
    W[0, :5] = [8, 0.5, -0.5, 1.5, -7]
    q, scales = quantize(W)
    assert q[0, 0, :5].tolist() == [-8, -1, 1, -2, 7]
    assert scales[0, 0] == -1
