"""safetensors: what we write the reference reads; what is damaged is told, never read."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.formats.errors import FormatError
from buildsys.formats.safetensors_file import (
    DTYPES,
    SafetensorsSource,
    SafetensorsWriter,
    save_safetensors,
)
from buildsys.formats.tensors import RenamedSource, TensorEntry, copy_tensor, entries_of

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
TABLES = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=6
)


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Bytes from a counter, so that every element differs and NaNs are possible."""
    nbytes = torch.empty(shape).numel() * dtype.itemsize
    raw = (torch.arange(nbytes) * 37 + seed).to(torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = [TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that holds for NaNs too."""
    flat_a, flat_b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and bool(torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8)))


@given(TABLES)
@settings(deadline=None, max_examples=60)
def test_reference_reads_back_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    tensors = {n: filled(DTYPES[d], s, i) for i, (n, (d, s)) in enumerate(table.items())}
    write(path, tensors)
    source = SafetensorsSource(path)
    # The reference library has no complex64 for Python in all supported versions: read the rest.
    if all(kind != "C64" for kind, _ in table.values()):
        read = safetensors.torch.load_file(path)
        assert read.keys() == tensors.keys()
        assert all(same_bytes(read[name], tensors[name]) for name in tensors)
    assert list(source.names()) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(source.read(name), tensor)
        if tensor.dim():
            assert same_bytes(source.rows(name, 1, 3), tensor[1:3])


def test_bytes_equal_the_reference_for_the_reference_order(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": filled(torch.float32, (3, i)) for i in range(4)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path / "theirs")
    save_safetensors(tmp_path / "ours", source, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert source.metadata == {"format": "pt"}


def test_golden_checkpoint_is_copied_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    original = golden / "mllm_qwen2_tiny" / "model.safetensors"
    source = SafetensorsSource(original)
    save_safetensors(tmp_path / "copy", source, {k: str(v) for k, v in source.metadata.items()})
    assert (tmp_path / "copy").read_bytes() == original.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=60)
def test_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write(folder / "whole", {"a": filled(torch.int16, (40,)), "b": filled(torch.float32, (9, 7))})
    content = (folder / "whole").read_bytes()
    (folder / "short").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(FormatError):
        SafetensorsSource(folder / "short")


def test_truncation_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "a", {n: filled(torch.float32, (8,)) for n in ("first", "second", "third")})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-40])
    with pytest.raises(FormatError, match="tensor 'second': its data ends at byte") as caught:
        SafetensorsSource(tmp_path / "a")
    assert caught.value.tensor == "second"
    assert caught.value.remedy


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
def test_damaged_header_is_refused_or_gives_tensors_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "a"
    write(path, {"a": filled(torch.int16, (40,)), "b": filled(torch.float32, (9, 7))})
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack_from("<Q", content)[0]
    content[position % header] = value
    path.write_bytes(content)
    try:
        source = SafetensorsSource(path)
    except FormatError:
        return
    assert sum(source.read(name).nbytes for name in source.names()) == len(content) - header


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a":{},"a":{}}', b"", "'a': is in the header twice"),
        ({"a": 3}, b"", "not an object"),
        ({"a": entry("F33", [1], 0, 4)}, b"1234", "dtype 'F33'"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", "shape"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"1234", "shape"),  # type: ignore[list-item]  # on purpose
        ({"a": entry("F32", [2**62, 4], 0, 4)}, b"1234", "needs"),
        ({"a": entry("F32", [1], 4, 0)}, b"1234", "data_offsets"),
        ({"a": entry("F32", [1], 0, 3)}, b"1234", "needs 4 bytes, data_offsets give 3"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123", "'b': .*overlaps"),
        ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123", "'b': .*gap"),
        ({"a": entry("U8", [1], 0, 1)}, b"123", "2 bytes follow"),
        ({"__metadata__": 1, "a": entry("U8", [1], 0, 1)}, b"1", "__metadata__"),
    ],
)
def test_bad_header_is_told(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        SafetensorsSource(header_file(tmp_path / "a", header, data))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 50])
def test_impossible_header_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FormatError, match=f"claims {length} bytes"):
        SafetensorsSource(tmp_path / "a")


def test_unfinished_writing_leaves_no_file(tmp_path: Path) -> None:
    entries = [TensorEntry("a", torch.float32, (4,)), TensorEntry("b", torch.float32, (4,))]
    with (
        pytest.raises(ValueError, match="no payload for b"),
        SafetensorsWriter(tmp_path / "x", entries) as writer,
    ):
        writer.write("a", torch.zeros(4))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(4), "payload of b came where a is due"),
        ("a", torch.zeros(4, dtype=torch.float64), "dtype"),
        ("a", torch.zeros(2, 2), "shape"),
    ],
)
def test_payload_that_is_not_due_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    entries = [TensorEntry("a", torch.float32, (4,)), TensorEntry("b", torch.float32, (4,))]
    with (
        pytest.raises(ValueError, match=message),
        SafetensorsWriter(tmp_path / "x", entries) as writer,
    ):
        writer.write(name, tensor)
    assert not (tmp_path / "x").exists()


def test_parts_make_the_whole_and_too_much_is_refused(tmp_path: Path) -> None:
    whole = filled(torch.float32, (5, 3))
    with SafetensorsWriter(tmp_path / "x", [TensorEntry("a", torch.float32, (5, 3))]) as writer:
        writer.write_part("a", whole[:2])
        writer.write_part("a", whole[2:])
        with pytest.raises(ValueError, match="already written"):
            writer.write_part("a", whole[:1])
    assert same_bytes(SafetensorsSource(tmp_path / "x").read("a"), whole)


def test_unknown_name_is_told_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "a", {"model.norm.weight": torch.zeros(2)})
    with pytest.raises(FormatError, match=re.escape("Did you mean 'model.norm.weight'?")):
        SafetensorsSource(tmp_path / "a").read("model.norm.weigth")


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        SafetensorsSource(tmp_path / "nothing")


def test_renamed_source_reads_under_new_names(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": filled(torch.float32, (4, 2)), "y": torch.zeros(1)})
    renamed = RenamedSource(SafetensorsSource(tmp_path / "a"), {"model.x": "x"})
    assert list(renamed.names()) == ["model.x"]
    assert same_bytes(renamed.rows("model.x", 1, 3), filled(torch.float32, (4, 2))[1:3])
    assert (renamed.stored_type("model.x"), renamed.nbytes("model.x")) == ("F32", 32)
    with pytest.raises(FormatError, match="'z'"):
        RenamedSource(SafetensorsSource(tmp_path / "a"), {"z": "z"})


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    tensor = filled(torch.int32, (9000,))
    write(tmp_path / "a", {"pad": filled(torch.uint8, (5000,)), "a": tensor})
    source = SafetensorsSource(tmp_path / "a")
    view = source.read("a")
    source.release("a")
    source.release("pad")
    assert torch.equal(view, tensor)
    assert torch.equal(source.read("a"), tensor)


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match
    return int(match[1]) / 1024


@pytest.mark.parametrize("padding", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_converting_a_large_tensor_holds_parts_only(tmp_path: Path, padding: int) -> None:
    rows, columns = 48, 2**20  # 96 MiB in float16, 192 MiB in float32
    header = json.dumps({"a": entry("F16", [rows, columns], 0, rows * columns * 2)}).encode()
    header += b" " * (-len(header) % 8 + padding)
    path = header_file(tmp_path / "large", header)
    with path.open("r+b") as stream:  # sparse: zeros without disk space
        stream.truncate(path.stat().st_size + rows * columns * 2)
    source = SafetensorsSource(path)
    before, peak = anonymous_mib(), 0.0

    def widen(part: torch.Tensor) -> torch.Tensor:
        nonlocal peak
        wide = part.float()
        peak = max(peak, anonymous_mib() - before)
        return wide

    out = [TensorEntry("a", torch.float32, (rows, columns))]
    with SafetensorsWriter(tmp_path / "out", out) as writer:
        copy_tensor(source, "a", writer, convert=widen)
    assert 0 < peak < 90
    assert entries_of(SafetensorsSource(tmp_path / "out")) == out
