"""Rotations: the files of mllm and of libtorch are read, ours repeat, bad ones are named."""

from __future__ import annotations

import math
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.formats.errors import FormatError
from buildsys.formats.rotation_file import Rotation, load_rotation, matrices_of, save_rotation
from buildsys.formats.torchscript_file import read_torchscript


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q


def rotation() -> Rotation:
    return Rotation(
        R=orthogonal(12),
        R_v=(orthogonal(4, 1), orthogonal(4, 2)),
        R_vit=orthogonal(6, 3),
        R_vs_vit=(orthogonal(3, 4),),
        metadata={"construction": "hadamard", "seed": 0, "factors": [4, 3]},
    )


def torchscript(path: Path, **tensors: torch.Tensor) -> Path:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the vendor's files are not
        torch.jit.script(module).save(path)
    return path


def test_rotation_survives_the_file(tmp_path: Path) -> None:
    save_rotation(tmp_path / "r.bin", rotation())
    read = load_rotation(tmp_path / "r.bin")
    pairs = zip(matrices_of(read), matrices_of(rotation()), strict=True)
    assert all(a == b and torch.equal(R, Q) for (a, R), (b, Q) in pairs)
    assert read.metadata == rotation().metadata
    assert read.format == "mllm"


def test_mllms_loader_finds_what_it_indexes(tmp_path: Path) -> None:
    save_rotation(tmp_path / "r.bin", rotation())
    content = torch.load(tmp_path / "r.bin", weights_only=True)
    assert list(content) == ["R", "R_v", "R_vit", "R_vs_vit", "qbuild"]
    assert isinstance(content["R_v"], list)
    assert torch.equal(content["R_vs_vit"][0], rotation().R_vs_vit[0])


def test_bytes_repeat_under_any_name(tmp_path: Path) -> None:
    save_rotation(tmp_path / "r.bin", rotation())
    save_rotation(tmp_path / "elsewhere", rotation())
    assert (tmp_path / "r.bin").read_bytes() == (tmp_path / "elsewhere").read_bytes()


@pytest.mark.parametrize(
    ("file", "sizes"),
    [("mllm_qwen2_tiny/R.bin", [256, 64, 64]), ("mllm_qwen2vl_tiny/rotation.bin", None)],
)
def test_golden_rotations_of_mllm_are_read_and_written(
    golden: Path, tmp_path: Path, file: str, sizes: list[int] | None
) -> None:
    read = load_rotation(golden / file)
    theirs = torch.load(golden / file, weights_only=True)
    assert torch.equal(read.R, theirs["R"])
    assert sizes is None or [R.shape[0] for _, R in matrices_of(read)] == sizes
    assert len(read.R_vs_vit) == len(theirs.get("R_vs_vit", []))
    save_rotation(tmp_path / "r.bin", read)
    ours = torch.load(tmp_path / "r.bin", weights_only=True)
    assert list(ours) == list(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours["R_v"], theirs["R_v"], strict=True))


def test_rotation_that_libtorch_saved_is_read(small_golden: Path) -> None:
    read = load_rotation(small_golden / "global_rotation.pth")
    expected = [
        [(-1) ** i * (-1) ** (i & j).bit_count() / math.sqrt(8) for j in range(8)] for i in range(8)
    ]
    assert read.format == "torchscript"
    assert torch.equal(read.R, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_read_as_torch_itself_reads_it(tmp_path: Path) -> None:
    # A transposed parameter: the archive keeps its stride.
    path = torchscript(tmp_path / "r.pth", **{"0": orthogonal(16).T})
    theirs = torch.jit.load(path, map_location="cpu").state_dict()["0"]
    assert torch.equal(load_rotation(path).R, theirs)


def test_torchscript_with_more_than_the_rotation_is_refused(tmp_path: Path) -> None:
    path = torchscript(tmp_path / "r.pth", R=orthogonal(4), S=orthogonal(4))
    with pytest.raises(FormatError, match=r"\['R', 'S'\], not the one tensor '0'"):
        load_rotation(path)


def test_torchscript_that_names_other_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("r/data.pkl", pickle.dumps(print, protocol=2))
        archive.writestr("r/constants.pkl", b"")
    with pytest.raises(FormatError, match=r"it needs (__builtin__|builtins)\.print"):
        load_rotation(path)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
def test_damaged_torchscript_is_refused_or_read_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, small_golden: Path, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "r.pth"
    content = bytearray((small_golden / "global_rotation.pth").read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        tensors = read_torchscript(path)
    except FormatError:
        return
    assert all(tensor.nbytes <= len(content) for tensor in tensors.values())


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=40)
def test_truncated_rotation_is_refused(
    tmp_path_factory: pytest.TempPathFactory, small_golden: Path, cut: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    save_rotation(folder / "ours", rotation())
    for path in (folder / "ours", small_golden / "global_rotation.pth"):
        content = path.read_bytes()
        (folder / "short").write_bytes(content[: int(cut * len(content))])
        with pytest.raises(FormatError):
            load_rotation(folder / "short")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": None}, "field 'R': is missing"),
        ({"R": orthogonal(4).float()}, "'R': is float32, not float64"),
        ({"R": orthogonal(4)[:3]}, r"'R': has shape \[3, 4\], which is not square"),
        ({"R": orthogonal(4) * 1.001}, "'R': is not orthogonal"),
        ({"R": orthogonal(4) * float("nan")}, "'R': is not orthogonal"),
        ({"R_v": [orthogonal(2), orthogonal(2) + 1e-5]}, r"'R_v\[1\]': is not orthogonal"),
        ({"R_v": [orthogonal(2), orthogonal(3)]}, "'R_v': has matrices of different sizes"),
        ({"R_v": 3}, "'R_v': is a int, not a list"),
        ({"R_v": ["x"]}, r"'R_v\[0\]': is a str, not a tensor"),
        ({"R_vit": orthogonal(3)}, "'R_vs_vit': is missing"),
        ({"R_vs_vit": []}, "'R_vit': is missing"),
    ],
)
def test_wrong_rotation_is_told_by_its_matrix(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    content = {"R": orthogonal(4), "R_v": [orthogonal(2)], **change}
    torch.save({k: v for k, v in content.items() if v is not None}, tmp_path / "r.bin")
    with pytest.raises(FormatError, match=message):
        load_rotation(tmp_path / "r.bin")


def test_mllms_rounding_of_the_square_root_is_accepted(tmp_path: Path) -> None:
    # mllm divides by a float32 sqrt(n): 6e-8 off orthogonal for n = 8.
    signs = load_rotation_signs()
    R = signs / torch.tensor(8.0).sqrt().double()
    torch.save({"R": R, "R_v": []}, tmp_path / "r.bin")
    assert float((R @ R.T - torch.eye(8)).abs().max()) > 1e-9
    assert torch.equal(load_rotation(tmp_path / "r.bin").R, R)


def load_rotation_signs() -> torch.Tensor:
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)]
    ).double()


def test_file_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    torch.save(orthogonal(4), tmp_path / "r.bin")
    with pytest.raises(FormatError, match="holds a Tensor, not a dict of matrices"):
        load_rotation(tmp_path / "r.bin")
