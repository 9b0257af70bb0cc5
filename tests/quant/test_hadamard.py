"""Hadamard matrices are Hadamard, and sizes are chosen as mllm chooses them."""

from __future__ import annotations

import numpy as np
import pytest

from buildsys.quant.errors import QuantError
from buildsys.quant.hadamard import BLOCK_ORDERS, block, hadamard_matrix, mllm_block_order


@pytest.mark.parametrize("order", [1, 2, 4, 64, *BLOCK_ORDERS])
def test_entries_are_signs_and_rows_are_orthogonal(order):
    H = block(order)
    assert set(np.unique(H)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(H @ H.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("size", "order"),
    [
        # Sizes of real models and mllm's block for them.
        (2048, 1), (1536, 12), (896, 28), (3584, 28), (1280, 40), (80, 40), (64, 1), (128, 1),
        (576, 36), (160, 40), (5120, 40), (11008, 172), (9728, None), (18944, None), (720, None),
    ],
)  # fmt: skip
def test_blocks_are_chosen_as_mllm_chooses(size, order):
    assert mllm_block_order(size) == order


def test_size_without_a_matrix_is_refused_with_the_way_out():
    with pytest.raises(QuantError, match=r"size 720 .* 720 = 60 x 12.*use method: kronecker"):
        hadamard_matrix(720)
    with pytest.raises(QuantError, match=r"order 44 .*use method: kronecker"):
        block(44)
