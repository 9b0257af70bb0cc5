"""Block quantizers against golden bytes of ggml's C, and against two peers at run time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from buildsys.quant import ggml_blocks
from buildsys.quant.errors import QuantError
from buildsys.quant.ggml_blocks import BLOCKS, dequantize, quantize

TYPES = sorted(BLOCKS)
# Mean squared errors of normal weights that each type stays below.
ERRORS = [("Q8_0", 8e-5), ("Q6_K", 1e-3), ("Q5_K", 3e-3), ("Q4_K", 9e-3), ("Q3_K", 4e-2)]
ERRORS += [("Q2_K", 0.12)]


def distributions() -> dict[str, np.ndarray]:
    """Weights [64, 2048] as real tensors have them, and the corners of float32."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((64, 2048))
    per_block = 10.0 ** rng.integers(-44, 38, (64, 64)).repeat(32, axis=1)
    cases = {
        "normal": normal,
        "student_t": rng.standard_t(2, normal.shape),
        "bf16_grid": torch.tensor(0.02 * normal).to(torch.bfloat16).double().numpy(),
        "zeros_of_both_signs": np.where(normal > 0, 0.0, -0.0),
        "one_sign": -np.abs(normal),
        "nearly_equal": -1 - 1e-6 * np.abs(normal),
        "few_values": rng.integers(-2, 3, normal.shape),
        "halves": rng.integers(-16, 17, normal.shape) / 2,
        "fp16_underflow": normal * 1e-30,
        "subnormal": normal * 1e-41,
        "squares_overflow": normal * 1e37,
        "every_magnitude": normal * per_block,
    }
    return {name: x.astype(np.float32) for name, x in cases.items()}


@pytest.fixture(params=["numpy", "compiled"])
def kernel(request, monkeypatch):
    """Both kernels of a type, whatever the size of the tensor."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="pip install numba (extra: fast)")
        monkeypatch.setattr(ggml_blocks, "CHUNK", 1 << 15)
    monkeypatch.setattr(ggml_blocks, "available", lambda: request.param == "compiled")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("type_name", TYPES)
def test_bytes_are_those_of_the_reference(type_name, golden_blocks):
    blocks = quantize(golden_blocks["x"], type_name)
    np.testing.assert_array_equal(blocks, golden_blocks[type_name])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", distributions())
@pytest.mark.parametrize("type_name", TYPES)
def test_bytes_are_those_of_peers_on_any_weights(type_name, case, peer):
    x = distributions()[case]
    np.testing.assert_array_equal(quantize(x, type_name), peer(x, type_name))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("type_name", TYPES)
def test_any_number_of_blocks_gives_the_same_bytes(type_name, golden_blocks, monkeypatch):
    monkeypatch.setattr(ggml_blocks, "CHUNK", 256)
    for rows in (1, 2, 3, 17):
        blocks = quantize(golden_blocks["x"][:rows], type_name)
        np.testing.assert_array_equal(blocks, golden_blocks[type_name][: len(blocks)])


@pytest.mark.parametrize("type_name", TYPES)
def test_chunks_do_not_change_bytes(type_name, golden_blocks, monkeypatch):
    monkeypatch.setattr(ggml_blocks, "CHUNK", 768)
    blocks = quantize(golden_blocks["x"][:16], type_name)
    np.testing.assert_array_equal(blocks, golden_blocks[type_name][: len(blocks)])
    whole = dequantize(golden_blocks[type_name], type_name)
    monkeypatch.undo()
    np.testing.assert_array_equal(whole, dequantize(golden_blocks[type_name], type_name))


@pytest.mark.parametrize("type_name", TYPES)
def test_dequantized_values_are_those_of_gguf(type_name, golden_blocks):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    qtype = gguf.GGMLQuantizationType[type_name]
    expected = gguf.dequantize(golden_blocks[type_name], qtype).reshape(-1)
    np.testing.assert_array_equal(dequantize(golden_blocks[type_name], type_name), expected)


@pytest.mark.parametrize(("type_name", "bound"), ERRORS)
def test_error_is_what_the_bits_allow(type_name, bound):
    x = np.random.default_rng(3).standard_normal((16, 256)).astype(np.float32)
    decoded = dequantize(quantize(x, type_name), type_name).reshape(x.shape)
    assert np.mean((decoded - x) ** 2) < bound


@pytest.mark.parametrize(("type_name", "width"), [("Q4_K", 576), ("Q6_K", 160), ("Q4_0", 80)])
def test_rows_that_do_not_divide_are_refused_by_name(type_name, width):
    x = np.zeros((4, width), dtype=np.float32)
    with pytest.raises(QuantError, match=rf"layers\.0\.q_proj: rows of {width} .* fallback"):
        quantize(x, type_name, name="layers.0.q_proj")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    x = np.zeros((2, 256), dtype=np.float32)
    x[1, 3] = bad
    with pytest.raises(QuantError, match="lm_head: has values that are not finite"):
        quantize(x, "Q4_K", name="lm_head")


def test_unknown_types_are_refused_with_the_known_ones():
    with pytest.raises(QuantError, match=r"'Q9_K' is unknown here; use one of Q4_0, Q8_0"):
        quantize(np.zeros((1, 256)), "Q9_K")


@pytest.mark.parametrize("type_name", TYPES)
def test_bytes_do_not_depend_on_threads(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_blocks, "CHUNK", 512)
    x = np.random.default_rng(6).standard_normal((9, 512), dtype=np.float32)
    one = quantize(x, type_name)
    assert np.array_equal(quantize(x, type_name, threads=3), one)
    x[7, 3] = np.nan
    with pytest.raises(QuantError, match="up_proj: has values that are not finite"):
        quantize(x, type_name, name="up_proj", threads=3)
