"""Rotations: orthogonal, repeatable, the same by factors as dense, and identities of the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.quant import rotation
from buildsys.quant.errors import QuantError
from buildsys.quant.factored import Rotation, dense_rotation
from buildsys.quant.random_rotation import make_layernorm_rotation, make_rotation
from buildsys.quant.recover import recover

SIZES = [1, 2, 45, 64, 80, 100, 160, 256, 576, 720, 896]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def rotations(size: int) -> list[Rotation]:
    return [
        make_rotation(size, seed=3, stream=("R",)),
        make_rotation(size, method="kronecker", seed=3),
        make_layernorm_rotation(size, seed=3),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal(size):
    for R, tolerance in zip(rotations(size), (2e-7, 1e-13, 1e-13), strict=True):
        gram = R.dense() @ R.dense().T
        torch.testing.assert_close(gram, torch.eye(size).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_factors_multiply_as_the_dense_matrix(size):
    x = normal(size, 7)
    for R in rotations(size):
        dense = R.dense()
        torch.testing.assert_close(R.turn(x), dense.T @ x, rtol=0, atol=1e-12)
        torch.testing.assert_close(R.inverse().turn(x), dense @ x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_stored_matrix_gives_its_factors_back_bit_for_bit(size):
    for R in rotations(size):
        stored = R.dense()
        for matrix in (stored, stored.T.contiguous()):
            assert torch.equal(recover(matrix).dense(), matrix)


@pytest.mark.parametrize(("size", "cost"), [(576, 52), (1536, 36), (2048, 40)])
def test_recovered_factors_are_cheap(size, cost):
    assert recover(make_rotation(size).dense()).cost == cost


def test_rotations_of_mllm_are_recognised(golden):
    stored = torch.load(golden / "mllm_qwen2vl_tiny" / "rotation.bin", weights_only=True)
    matrices = [stored["R"], stored["R_vit"], *stored["R_v"], *stored["R_vs_vit"]]
    for matrix in matrices:
        found = recover(matrix)
        assert torch.equal(found.dense(), matrix)
        assert found.cost < len(matrix)


def test_matrix_without_factors_is_used_as_it_is():
    Q = torch.linalg.qr(normal(96, 96)).Q
    found = recover(Q)
    assert found.cost == 96
    assert torch.equal(found.dense(), Q)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(4, 3), r"R\.bin: a rotation is a square matrix, this has shape \(4, 3\)"),
        (torch.full((4, 4), torch.nan), r"R\.bin: has values that are not finite"),
        (2 * torch.eye(4), r"R\.bin: not orthogonal"),
        (make_rotation(96).dense().to(torch.bfloat16), r"R\.bin: not orthogonal .* too few bits"),
    ],
)
def test_what_is_no_rotation_is_refused_by_name(matrix, message):
    with pytest.raises(QuantError, match=message):
        recover(matrix, "R.bin")


def test_seed_and_stream_decide_and_nothing_else():
    first = make_rotation(80, seed=1, stream=("R_v", 0)).dense()
    assert torch.equal(first, make_rotation(80, seed=1, stream=("R_v", 0)).dense())
    for other in ({"seed": 2, "stream": ("R_v", 0)}, {"seed": 1, "stream": ("R_v", 1)}):
        assert not torch.equal(first, make_rotation(80, **other).dense())


def test_signs_of_a_seed_never_change():
    """The bytes of a rotation are a promise across machines and versions of numpy."""
    signs = (make_rotation(8, seed=0, stream=("R",)).dense()[:, 0] > 0).tolist()
    assert signs == [True, True, True, False, True, False, False, True]


@pytest.mark.parametrize("size", [80, 100, 160, 1280])
def test_layernorm_survives_the_vit_rotation(size):
    R = make_layernorm_rotation(size, seed=5)
    x = normal(20, size)
    x[:, 3] *= 50  # an outlier channel, as in real ViTs
    x -= x.mean(dim=1, keepdim=True)
    turned = R.turn(x.T.contiguous()).T

    def layernorm(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(rows, (size,), eps=1e-6)

    expected = R.turn(layernorm(x).T.contiguous()).T
    torch.testing.assert_close(layernorm(turned), expected, rtol=0, atol=1e-12)
    ones = torch.ones(size, 1, dtype=torch.float64)
    torch.testing.assert_close(R.turn(ones), ones, rtol=0, atol=1e-13)
    assert peak_to_rms(turned) < 0.6 * peak_to_rms(x)


def peak_to_rms(x: torch.Tensor) -> float:
    return float((x.abs().amax(dim=1) / x.square().mean(dim=1).sqrt()).mean())


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([12, 20, 64, 96]),
    blocks=st.integers(1, 4),
    features=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_turned_weights_see_turned_inputs(size, blocks, features, seed):
    """x W^T = (x R) (W R)^T, and x (R^T W)^T + b R = (x W^T + b) R, per block."""
    R = make_rotation(size, method="kronecker", seed=seed)
    Q = torch.block_diag(*[R.dense()] * blocks)
    x, W = normal(5, size * blocks, seed=seed), normal(features, size * blocks, seed=seed + 1)
    turned = rotation.rotate_input(W, R, blocks=blocks)
    torch.testing.assert_close((x @ Q) @ turned.T, x @ W.T, rtol=0, atol=1e-11)

    x, W, bias = normal(5, features), W.T.contiguous(), normal(size * blocks)
    turned = rotation.rotate_output(W, R, blocks=blocks)
    turned_bias = rotation.rotate_bias(bias, R, blocks=blocks)
    torch.testing.assert_close(x @ turned.T + turned_bias, (x @ W.T + bias) @ Q, rtol=0, atol=1e-11)


def test_r2_cancels_between_v_and_o_with_grouped_heads():
    """Attention mixes values with scalars, so o(v) does not change: 4 heads on 2 kv heads."""
    hidden, head_dim, kv_heads, heads = 24, 20, 2, 4
    R = make_rotation(head_dim, method="kronecker")
    v, bias, o = (
        normal(kv_heads * head_dim, hidden),
        normal(kv_heads * head_dim),
        normal(hidden, heads * head_dim),
    )
    x = normal(6, hidden)

    def attend(v, bias, o):
        values = (x @ v.T + bias).view(6, kv_heads, head_dim)
        repeated = values.repeat_interleave(heads // kv_heads, dim=1)
        return repeated.flatten(1) @ o.T

    turned = attend(
        rotation.rotate_output(v, R, blocks=kv_heads),
        rotation.rotate_bias(bias, R, blocks=kv_heads),
        rotation.rotate_input(o, R, blocks=heads),
    )
    torch.testing.assert_close(turned, attend(v, bias, o), rtol=0, atol=1e-11)


def test_fused_norm_is_the_norm():
    x, W, bias = normal(4, 12), normal(7, 24), normal(7)
    gain, shift = normal(12, seed=1), normal(12, seed=2)
    pair = torch.cat([x, 2 * x], dim=1)  # the merger's patches: one norm, tiled
    expected = (pair * gain.repeat(2) + shift.repeat(2)) @ W.T + bias
    fused = rotation.fuse_norm(W, gain, blocks=2)
    fused_bias = rotation.fuse_norm_bias(W, shift, bias, blocks=2)
    torch.testing.assert_close(pair @ fused.T + fused_bias, expected, rtol=0, atol=1e-12)


def test_centered_writers_have_no_mean():
    W, bias, x = normal(12, 3, 2, 2), normal(12), normal(5, 12)
    center = rotation.center_output(W)
    y = x @ center.reshape(12, 12).T + rotation.center_bias(bias)
    plain = x @ W.reshape(12, 12).T + bias
    torch.testing.assert_close(y, plain - plain.mean(dim=1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_and_places_do_not_change_bits(dtype, monkeypatch):
    W, gain = normal(96, 40).to(dtype), normal(40)
    R, S = make_rotation(96), make_rotation(40)

    def results() -> list[torch.Tensor]:
        return [
            rotation.fuse_norm(W, gain),
            rotation.rotate_input(W, S),
            rotation.rotate_output(W, R),
            rotation.center_output(W),
        ]

    whole = results()
    monkeypatch.setattr("buildsys.quant.factored.CHUNK", 200)
    monkeypatch.setattr("buildsys.quant.rotation.ROWS_CHUNK", 200)
    for part, expected in zip(results(), whole, strict=True):
        assert part.dtype == dtype
        torch.testing.assert_close(
            part, expected, rtol=1e-12 if dtype == torch.float64 else 0, atol=0
        )
    place = W.clone()
    assert rotation.rotate_output(place, R, out=place) is place
    torch.testing.assert_close(place, whole[2], rtol=0, atol=1e-13)


def test_rotation_of_another_size_is_refused():
    with pytest.raises(QuantError, match=r"in_features is 40, .* 2 x 16; .* another model"):
        rotation.rotate_input(normal(3, 40), make_rotation(16), blocks=2)
    with pytest.raises(QuantError, match=r"norm weight: 1 x 3 values do not fit .* 4 inputs"):
        rotation.fuse_norm(normal(2, 4), normal(3))


def test_dense_and_factored_products_agree_on_a_real_size():
    R = make_rotation(1536)
    W = normal(8, 1536)
    factored = rotation.rotate_input(W, R)
    torch.testing.assert_close(
        factored, rotation.rotate_input(W, dense_rotation(R.dense())), rtol=0, atol=1e-12
    )
