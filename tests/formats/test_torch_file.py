"""torch checkpoints: nothing in them is run, what is damaged is told, our bytes repeat."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.formats import torch_file
from buildsys.formats.errors import FormatError
from buildsys.formats.tensors import TensorEntry
from buildsys.formats.torch_archive import (
    ALIGNMENT,
    StateDictWriter,
    TorchArchiveWriter,
    Tree,
    save_state_dict,
)
from buildsys.formats.torch_file import TorchFileSource, load_guarded

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.float8_e4m3fn,
]


def state_dict() -> dict[str, torch.Tensor]:
    """What an int8 checkpoint of mllm looks like: transposed int8 beside scalars and floats."""
    weight = torch.arange(-12, 12, dtype=torch.int8).reshape(4, 6)
    return {
        "q_proj.weight": weight.T,
        "q_proj.weight.scale": torch.tensor(0.5),
        "q_proj.clip_input": torch.tensor(True),
        "norm.weight": torch.arange(100, dtype=torch.float32),
        "empty": torch.empty(0, 3),
    }


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    assert list(read) == list(written)
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor), name
        assert (read[name].dtype, read[name].stride()) == (tensor.dtype, tensor.stride()), name


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_load_reads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    save_state_dict(tmp_path / "a.pth", state_dict())
    assert_same(torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap), state_dict())


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_every_dtype_and_axis_order_survives(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shape: list[int], order: object
) -> None:
    path = tmp_path_factory.mktemp("p") / "a.pth"
    axes = list(range(len(shape)))
    order.shuffle(axes)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    stored = torch.arange(torch.empty(shape).numel()).reshape(shape).to(dtype)
    tensor = stored.permute(axes)
    save_state_dict(path, {"x": tensor})
    read = torch.load(path, weights_only=True)["x"]
    assert read.dtype == dtype
    assert torch.equal(read.double(), tensor.double())
    if all(size > 1 for size in shape):  # the stride of an axis of one element means nothing
        assert read.stride() == tensor.stride()


def test_bytes_depend_on_neither_file_name_nor_shared_objects(tmp_path: Path) -> None:
    first = state_dict()
    shape = (2, 2)
    entries = [TensorEntry("a", torch.float32, shape), TensorEntry("b", torch.float32, shape)]
    apart = [TensorEntry(n, torch.float32, tuple([2, 2])) for n in "ab"]  # noqa: C409 - two objects
    for name, table in (("one", entries), ("another-name", apart)):
        save_state_dict(tmp_path / f"{name}.pth", {k: t.clone() for k, t in first.items()})
        with StateDictWriter(tmp_path / f"{name}.bin", table) as writer:
            writer.write("a", torch.ones(2, 2))
            writer.write("b", torch.ones(2, 2))
    for kind in ("pth", "bin"):
        one = (tmp_path / f"one.{kind}").read_bytes()
        assert one == (tmp_path / f"another-name.{kind}").read_bytes()


def test_archive_is_a_sound_zip_with_aligned_payloads(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "a.pth", state_dict())
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
    assert payload_offsets(tmp_path / "a.pth") == {0}


def test_large_payloads_take_zip64_and_stay_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same code path as above 2 GiB, without writing 2 GiB.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 64)
    save_state_dict(tmp_path / "a.pth", state_dict())
    monkeypatch.undo()
    assert payload_offsets(tmp_path / "a.pth") == {0}
    assert_same(torch.load(tmp_path / "a.pth", weights_only=True, mmap=True), state_dict())


def payload_offsets(path: Path) -> set[int]:
    content = path.read_bytes()
    offsets = set()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", content, info.header_offset + 26)
            offsets.add((info.header_offset + 30 + name + extra) % ALIGNMENT)
    return offsets


def test_parts_of_a_transposed_weight_come_by_its_outermost_stored_axis(tmp_path: Path) -> None:
    stored = torch.arange(24, dtype=torch.int8).reshape(4, 6)  # [out, in] in memory
    logical = stored.T
    entry = TensorEntry("w", torch.int8, (6, 4), stride=(1, 6))
    with StateDictWriter(tmp_path / "a.pth", [entry]) as writer:
        writer.write_part("w", logical[:, :3])
        writer.write_part("w", logical[:, 3:])
    assert_same(torch.load(tmp_path / "a.pth", weights_only=True), {"w": logical})


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    entries = [TensorEntry("w", torch.int8, (1,))] * 2
    with pytest.raises(FormatError, match="'w': is in the table twice"):
        StateDictWriter(tmp_path / "a.pth", entries)


def test_trees_keep_lists_and_plain_values(tmp_path: Path) -> None:
    entry = TensorEntry("w", torch.float64, (2,))
    made = {"by": "test", "ok": True, "x": 0.5, "none": None}
    tree: Tree = {"list": (entry, 3), "made": made}
    with TorchArchiveWriter(tmp_path / "a.bin", tree) as writer:
        writer.write("w", torch.ones(2, dtype=torch.float64))
    read = torch.load(tmp_path / "a.bin", weights_only=True)
    assert torch.equal(read["list"][0], torch.ones(2, dtype=torch.float64))
    assert (read["list"][1], read["made"]) == (3, made)


def test_interrupted_writing_leaves_no_file(tmp_path: Path) -> None:
    def write_half() -> None:
        entry = TensorEntry("w", torch.int8, (4,))
        with StateDictWriter(tmp_path / "a.pth", [entry]) as writer:
            writer.write_part("w", torch.zeros(2, dtype=torch.int8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not (tmp_path / "a.pth").exists()


def test_golden_int8_checkpoint_survives_rewriting(golden: Path, tmp_path: Path) -> None:
    original = golden / "mllm_qwen2_tiny" / "int8.pth"
    source = TorchFileSource(original)
    save_state_dict(tmp_path / "a.pth", {name: source.read(name) for name in source.names()})
    theirs = torch.load(original, weights_only=True)
    assert_same(torch.load(tmp_path / "a.pth", weights_only=True), theirs)
    assert theirs["model.layers.0.self_attn.k_proj.weight"].stride() == (1, 256)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_needs_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "was-run"
    content = {"w": torch.zeros(2), "x": Malicious(mark)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="refused, because loading it would run code") as caught:
        TorchFileSource(tmp_path / "a.pth")
    assert "safetensors" in str(caught.value.remedy)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_malicious_pickle_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(FormatError):
        TorchFileSource(tmp_path / "a.bin")
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; old files are not
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pth")
    with pytest.raises(FormatError, match="TorchScript"):
        TorchFileSource(tmp_path / "a.pth")


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_state_dict_is_unwrapped_and_other_entries_noted(
    tmp_path: Path, wrapper: str
) -> None:
    torch.save({"epoch": 3, wrapper: {"w": torch.ones(2), "note": "x"}}, tmp_path / "a.pth")
    source = TorchFileSource(tmp_path / "a.pth")
    assert (list(source.names()), source.ignored) == (["w"], ("note",))
    assert torch.equal(source.read("w"), torch.ones(2))


def test_file_of_the_old_format_is_read(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    source = TorchFileSource(tmp_path / "a.pth")
    assert_same({name: source.read(name) for name in source.names()}, state_dict())


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, torch.ones(2)])
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(FormatError, match=r"not a dict of tensors|holds no tensor"):
        TorchFileSource(tmp_path / "a.pth")


@given(cut=st.floats(0, 1, exclude_max=True), old=st.booleans())
@settings(deadline=None, max_examples=60)
def test_truncated_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: float, old: bool
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.pth"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=not old)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(FormatError):
        TorchFileSource(path)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_guarded(tmp_path / "nothing.pth")


def test_released_tensors_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "REOPEN_AFTER", 1)
    save_state_dict(tmp_path / "a.pth", state_dict())
    source = TorchFileSource(tmp_path / "a.pth")
    view = source.read("norm.weight")
    source.release("norm.weight")
    assert torch.equal(view, state_dict()["norm.weight"])
    assert source.read("norm.weight") is not view
    assert torch.equal(source.rows("norm.weight", 5, 7), torch.tensor([5.0, 6.0]))
