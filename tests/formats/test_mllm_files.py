""".mllm: the real tools' files are read exactly and made again byte for byte."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.formats.checkpoint import open_checkpoint
from buildsys.formats.errors import FormatError
from buildsys.formats.mllm_types import MllmEntry, MllmType, block_entry, plain_entry
from buildsys.formats.mllm_v1 import TYPES as V1_TYPES
from buildsys.formats.mllm_v1 import MllmV1Writer, open_mllm_v1, save_mllm_v1
from buildsys.formats.mllm_v2 import MllmV2Writer, open_mllm_v2, save_mllm_v2
from buildsys.formats.safetensors_file import SafetensorsSource
from buildsys.formats.tensors import TensorSource
from buildsys.formats.torch_archive import save_state_dict
from buildsys.formats.torch_file import TorchFileSource

V1_HEAD = 12
V2_HEADER, V2_DESCRIPTOR = 532, 352


def state_dict_source(folder: Path, tensors: Mapping[str, torch.Tensor]) -> TorchFileSource:
    save_state_dict(folder / "source.pth", tensors)
    return TorchFileSource(folder / "source.pth")


def copied(source: TensorSource, path: Path) -> bytes:
    save_mllm_v1(path, source)
    return path.read_bytes()


def test_golden_int8_mllm_is_made_from_its_pth_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    folder = golden / "mllm_qwen2_tiny"
    made = copied(open_checkpoint(folder / "int8.pth"), tmp_path / "int8.mllm")
    assert made == (folder / "int8.mllm").read_bytes()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_golden_quantized_files_are_rewritten_byte_for_byte(
    golden: Path, tmp_path: Path, kind: str
) -> None:
    original = golden / "mllm_qwen2_tiny" / f"rot_{kind}.mllm"
    source = open_mllm_v1(original)
    assert copied(source, tmp_path / "copy.mllm") == original.read_bytes()
    assert source.stored_type("model.layers.0.mlp.up_proj.weight") == kind
    assert source.stored_type("model.embed_tokens.weight") == "Q4_0"
    assert source.stored_type("model.layers.0.self_attn.q_proj.bias") == "F32"
    assert sorted(source.names()) == list(source.names())


def test_golden_quantized_sizes_follow_from_the_checkpoints_shapes(golden: Path) -> None:
    folder = golden / "mllm_qwen2_tiny"
    original = SafetensorsSource(folder / "model.safetensors")
    source = open_mllm_v1(folder / "rot_Q4_K.mllm")
    for name in source.names():
        kind, shape = source.entry(name).type, original.shape(name)
        quantized = kind is not MllmType.F32
        entry = (block_entry if quantized else plain_entry)(name, kind, shape)
        assert source.nbytes(name) == entry.nbytes, name


def test_index_equals_that_of_mllms_converter(small_golden: Path, tmp_path: Path) -> None:
    table = json.loads((small_golden / "int8_table.json").read_text())
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in table
    }
    index = (small_golden / "int8.index").read_bytes()
    made = copied(state_dict_source(tmp_path, tensors), tmp_path / "a.mllm")
    assert made[: len(index)] == index


def test_index_of_mllms_quantizer_is_parsed_and_written_again(
    small_golden: Path, tmp_path: Path
) -> None:
    index = (small_golden / "rot_Q4_K.index").read_bytes()
    # The index tells where the last payload ends: fill the file up with zeros.
    path = tmp_path / "a.mllm"
    path.write_bytes(index)
    with pytest.raises(FormatError, match="its data ends at byte") as caught:
        open_mllm_v1(path)
    assert caught.value.tensor == "lm_head.weight"
    with path.open("r+b") as stream:
        stream.truncate(821832)
    source = open_mllm_v1(path)
    assert source.nbytes("lm_head.weight") == 512 * 256 // 256 * 144
    assert copied(source, tmp_path / "b.mllm")[: len(index)] == index


def test_given_shapes_are_used_and_checked(golden: Path) -> None:
    path = golden / "mllm_qwen2_tiny" / "int8.mllm"
    theirs = TorchFileSource(golden / "mllm_qwen2_tiny" / "int8.pth")
    shapes = {name: theirs.shape(name) for name in theirs.names()}
    source = open_mllm_v1(path, shapes)
    for name in theirs.names():
        assert source.shape(name) == theirs.shape(name)
        assert torch.equal(source.read(name).to(theirs.dtype(name)), theirs.read(name)), name
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(source.rows(name, 3, 5), theirs.read(name)[3:5])
    assert open_mllm_v1(path).shape(name) == (256 * 128,)
    with pytest.raises(FormatError, match="belongs to another model"):
        open_mllm_v1(path, {name: (256, 127)})


def test_dtypes_become_what_mllms_converter_makes_of_them(tmp_path: Path) -> None:
    half = torch.tensor([0.1, -2.5, 60000.0])
    source = state_dict_source(
        tmp_path,
        {
            "f16": half.half(),
            "bf16": half.bfloat16(),
            "f64": half.double(),
            "bool": torch.tensor([True, False]),
            "u8": torch.tensor([7, 255], dtype=torch.uint8),
            "i64": torch.tensor([2**24, -3]),
        },
    )
    save_mllm_v1(tmp_path / "a.mllm", source)
    read = open_mllm_v1(tmp_path / "a.mllm")
    assert [read.entry(name).type.value for name in read.names()] == [0, 0, 0, 16, 31, 0]
    assert torch.equal(read.read("f16"), half.half().float())
    assert torch.equal(read.read("bf16"), half.bfloat16().float())
    assert read.read("bool").tolist() == [1, 0]
    assert read.read("u8").tolist() == [7, 255]
    assert read.read("i64").tolist() == [2.0**24, -3.0]


def test_int32_stays_int32(tmp_path: Path) -> None:
    bias = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    source = state_dict_source(tmp_path, {"q_proj.bias": bias})
    save_mllm_v1(tmp_path / "a.mllm", source)
    read = open_mllm_v1(tmp_path / "a.mllm")
    assert read.entry("q_proj.bias").type == 18
    assert torch.equal(read.read("q_proj.bias"), bias)


def test_int64_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = state_dict_source(tmp_path, {"x": torch.tensor([2**24 + 1])})
    with pytest.raises(FormatError, match="'x': has integers that float32"):
        save_mllm_v1(tmp_path / "a.mllm", source)
    assert not (tmp_path / "a.mllm").exists()


def test_dtype_without_a_code_is_refused(tmp_path: Path) -> None:
    source = state_dict_source(tmp_path, {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(FormatError, match=r"'x': complex64 has no type code in \.mllm"):
        save_mllm_v1(tmp_path / "a.mllm", source)


def test_names_are_renamed_as_the_converter_does_and_clashes_told(tmp_path: Path) -> None:
    tensors = {"a_weight": torch.zeros(1), "b_bias": torch.ones(1)}
    source = state_dict_source(tmp_path, tensors)
    save_mllm_v1(tmp_path / "a.mllm", source)
    assert list(open_mllm_v1(tmp_path / "a.mllm").names()) == ["a.weight", "b.bias"]
    save_mllm_v1(tmp_path / "b.mllm", source, rename=False)
    assert list(open_mllm_v1(tmp_path / "b.mllm").names()) == list(tensors)
    clash = state_dict_source(tmp_path, {"a_weight": torch.zeros(1), "a.weight": torch.zeros(1)})
    with pytest.raises(FormatError, match=r"'a\.weight': is in the table twice"):
        save_mllm_v1(tmp_path / "c.mllm", clash)


def test_names_beyond_ascii_keep_the_index_whole(tmp_path: Path) -> None:
    tensors = {"größe.weight": torch.arange(3.0), "层.weight": torch.arange(4.0)}
    source = state_dict_source(tmp_path, tensors)
    save_mllm_v1(tmp_path / "1.mllm", source)
    save_mllm_v2(tmp_path / "2.mllm", source)
    for path in (tmp_path / "1.mllm", tmp_path / "2.mllm"):
        read = open_checkpoint(path)
        assert {name: read.read(name).tolist() for name in read.names()} == {
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def test_v2_layout_is_the_documented_one(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3).bfloat16(), "b": torch.tensor(True)}
    save_mllm_v2(tmp_path / "a.mllm", state_dict_source(tmp_path, tensors), model_name="tiny")
    content = (tmp_path / "a.mllm").read_bytes()
    assert struct.unpack_from("<II512sIQ", content) == (
        0x519A,
        2,
        b"tiny".ljust(512, b"\0"),
        2,
        532,
    )
    first = struct.unpack_from("<IIQQQ16i256s", content, V2_HEADER)
    data = V2_HEADER + 2 * V2_DESCRIPTOR
    assert first[:7] == (0, 128, 12, data, 2, 2, 3)
    assert first[-1] == b"a.weight".ljust(256, b"\0")
    second = struct.unpack_from("<IIQQQ16i256s", content, V2_HEADER + V2_DESCRIPTOR)
    assert second[:5] == (1, 129, 1, data + 12, 0)
    assert len(content) == data + 13
    source = open_mllm_v2(tmp_path / "a.mllm")
    assert source.metadata["model_name"] == "tiny"
    assert torch.equal(source.read("a.weight"), tensors["a.weight"])
    assert source.shape("b") == ()


def test_quantized_payloads_keep_type_and_logical_shape_in_v2(tmp_path: Path) -> None:
    entry = block_entry("w", MllmType.Q4_0, (3, 64))
    payload = torch.arange(entry.nbytes).to(torch.uint8)
    with MllmV2Writer(tmp_path / "a.mllm", [entry]) as writer:
        writer.write("w", payload)
    source = open_mllm_v2(tmp_path / "a.mllm")
    assert source.entry("w") == MllmEntry("w", MllmType.Q4_0, (3, 64), 3 * 2 * 18)
    assert torch.equal(source.read("w"), payload)
    save_mllm_v2(tmp_path / "b.mllm", source)
    assert (tmp_path / "b.mllm").read_bytes() == (tmp_path / "a.mllm").read_bytes()


@pytest.mark.parametrize("shape", [(4, 576), (896,), ()])
def test_blocks_that_do_not_divide_the_last_axis_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"'w': shape .* does not divide into Q4_K"):
        block_entry("w", MllmType.Q4_K, shape)


def test_types_of_the_other_version_are_refused_or_converted(tmp_path: Path) -> None:
    bf16 = torch.tensor([1.0, 2.5]).bfloat16()
    save_mllm_v2(tmp_path / "2.mllm", state_dict_source(tmp_path, {"x": bf16}))
    save_mllm_v1(tmp_path / "1.mllm", open_mllm_v2(tmp_path / "2.mllm"))
    assert open_mllm_v1(tmp_path / "1.mllm").read("x").tolist() == [1.0, 2.5]
    kleidi = MllmEntry("k", MllmType.KLEIDIAI_Q4_0, (4,), 4)
    with pytest.raises(FormatError, match="version 2 has no KLEIDIAI_Q4_0"):
        MllmV2Writer(tmp_path / "x.mllm", [kleidi])
    with pytest.raises(FormatError, match="version 1 has no BF16"):
        MllmV1Writer(tmp_path / "x.mllm", [plain_entry("x", MllmType.BF16, (2,))])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (plain_entry("n" * 256, MllmType.F32, (1,)), "256 bytes"),
        (plain_entry("é" * 128, MllmType.F32, (1,)), "256 bytes"),
        (plain_entry("x", MllmType.F32, (1,) * 17), "17 dimensions"),
        (plain_entry("x", MllmType.I8, (2**31,)), "32-bit"),
    ],
)
def test_what_v2_cannot_hold_is_refused(tmp_path: Path, entry: MllmEntry, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        MllmV2Writer(tmp_path / "x.mllm", [entry])
    assert not (tmp_path / "x.mllm").exists()


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(list(V1_TYPES)), min_size=6, max_size=6),
)
@settings(deadline=None, max_examples=50)
def test_payloads_survive_unaligned_packing(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
) -> None:
    folder = tmp_path_factory.mktemp("m")
    tensors = {
        f"t{i}": torch.arange(math.prod(shape)).reshape(tuple(shape)).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    source = state_dict_source(folder, tensors)
    save_mllm_v1(folder / "1", source)
    save_mllm_v2(folder / "2", source)
    shapes_by_name = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for read in (open_mllm_v1(folder / "1", shapes_by_name), open_mllm_v2(folder / "2")):
        for name, tensor in tensors.items():
            values = read.read(name).reshape(tensor.shape)
            assert torch.equal(values.double(), tensor.double())


@given(cut=st.floats(0, 1, exclude_max=True), version=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=80)
def test_truncated_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: float, version: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    source = state_dict_source(folder, {"a": torch.arange(50.0), "b": torch.arange(7)})
    (save_mllm_v1 if version == 1 else save_mllm_v2)(folder / "a.mllm", source)
    content = (folder / "a.mllm").read_bytes()
    (folder / "a.mllm").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(FormatError):
        (open_mllm_v1 if version == 1 else open_mllm_v2)(folder / "a.mllm")


@given(position=st.integers(0, 100_000), value=st.integers(0, 255), version=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=150)
def test_damaged_table_is_refused_or_gives_tensors_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, version: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    source = state_dict_source(folder, {"a": torch.arange(50.0), "b": torch.arange(7)})
    (save_mllm_v1 if version == 1 else save_mllm_v2)(folder / "a.mllm", source)
    content = bytearray((folder / "a.mllm").read_bytes())
    table = len(content) - 4 * 50 - (4 if version == 1 else 8) * 7
    content[position % table] = value
    (folder / "a.mllm").write_bytes(content)
    try:
        read = (open_mllm_v1 if version == 1 else open_mllm_v2)(folder / "a.mllm")
    except FormatError:
        return
    assert all(read.read(name).nbytes <= len(content) for name in read.names())


def test_index_left_empty_by_a_killed_tool_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mllm"
    path.write_bytes(struct.pack("<iQ", 20012, 40) + bytes(40 + 100))
    with pytest.raises(FormatError, match="index is damaged"):
        open_mllm_v1(path)
    path.write_bytes(struct.pack("<iQ", 20012, 0) + bytes(100))
    with pytest.raises(FormatError, match="lists no tensor"):
        open_mllm_v1(path)
    path.write_bytes(struct.pack("<iQ", 20012, 2**63) + bytes(100))
    with pytest.raises(FormatError, match="index claims 9223372036854775808 bytes"):
        open_mllm_v1(path)
    path.write_bytes(struct.pack("<iQ", 20013, 0))
    with pytest.raises(FormatError, match="magic 20013"):
        open_mllm_v1(path)
