"""What a context binary was compiled for is told without Qualcomm's library, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from buildsys.formats import qnn_description
from buildsys.formats.description import describe
from buildsys.formats.errors import FormatError
from buildsys.formats.qnn_binary import MAGIC, QnnGraph, QnnTensor, read_target
from buildsys.formats.qnn_description import HOW, rows


def binary(folder: Path, *targets: str) -> Path:
    """A file that begins as a context does, with targets in it as the compiler writes them."""
    file = folder / "context.bin"
    file.write_bytes(MAGIC + bytes(64) + "".join(f";{each};" for each in targets).encode())
    return file


def test_the_target_is_told_and_how_to_get_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qnn_description, "_of_this_python", lambda: None)
    file = binary(tmp_path, "soc_type=SM8750;arch=79", "soc_type=SM8750;arch=79")
    found = describe(file)
    assert found.format == "QNN context"
    assert found.metadata == {"soc": "SM8750", "arch": "v79", "graphs": HOW}


@pytest.mark.parametrize(
    ("targets", "told"),
    [((), "no target"), (("soc_type=A;arch=73", "soc_type=B;arch=75"), "A v73, B v75")],
)
def test_no_target_or_several_are_an_error(
    tmp_path: Path, targets: tuple[str, ...], told: str
) -> None:
    with pytest.raises(FormatError, match=f"names {told}, not one target"):
        read_target(binary(tmp_path, *targets))


def test_a_library_that_is_none_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    file = binary(tmp_path, "soc_type=SM8750;arch=79")
    with pytest.raises(FormatError, match="cannot be read"):
        describe(file, lambda: str(file))


def test_a_tensor_is_told_with_its_encoding_and_size() -> None:
    graph = QnnGraph(
        "g",
        (QnnTensor("x", "ufxp16", (4, 8), 0.5, 3), QnnTensor("m", "uint8", (4,), None, None)),
        (QnnTensor("y", "sfxp8", (2, 2), 0.25, 0),),
    )
    assert list(rows((graph,))) == [
        ("x", "in ufxp16 0.5 @ 3", (4, 8), 64),
        ("m", "in uint8", (4,), 4),
        ("y", "out sfxp8 0.25 @ 0", (2, 2), 4),
    ]
