"""What qbuild reads of a .bmodel is what the vendor's model_tool says of it."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest

from buildsys.formats.bmodel_file import read_bmodel, summary, without_accidents
from buildsys.formats.description import describe
from buildsys.formats.errors import FormatError

GOLDEN = Path(__file__).parents[1] / "golden" / "sophgo"
BMODEL = GOLDEN / "lm_head.bmodel"
# Where the file has the padding of its top-k layer, and what another compilation left there.
PADDING, LEFT = 81941, bytes.fromhex("f880ff")


def test_nets_shapes_and_memory_are_those_that_the_vendors_tool_tells() -> None:
    told = (GOLDEN / "lm_head.txt").read_text()
    model = read_bmodel(BMODEL)
    assert f"bmodel version: B.{model.version}\nchip: {model.chip}\n" in told
    assert f"create time: {model.time}" in told
    assert f"kernel_module size: {model.kernels}\n" in told
    (net,) = model.nets
    assert f"net 0: [{net.name}]  {'dynamic' if net.dynamic else 'static'}" in told
    for kind, tensors in (("input", net.inputs), ("output", net.outputs)):
        lines = re.findall(rf"^{kind}: (\S+), (\[.*\]), (\w+),", told, re.MULTILINE)
        assert [(each.name, str(list(each.shape)), each.dtype) for each in tensors] == lines
    found = re.search(r"weight: (\d+), instruct: \d+, runtime: (\d+)", told)
    assert found is not None
    assert [net.weights, net.memory] == [int(found[1]), int(found[2])]
    assert summary(model)["bytes"] == BMODEL.stat().st_size


def test_two_compilations_of_one_thing_are_equal_without_their_accidents(tmp_path: Path) -> None:
    one, two = (Path(shutil.copy(BMODEL, tmp_path / name)) for name in ("one", "two"))
    content = bytearray(two.read_bytes())
    time = read_bmodel(BMODEL).time.encode()
    at = content.index(time)
    content[at : at + len(time)] = time.replace(b"2026", b"2031").replace(b"Nov", b"Feb")
    assert content[PADDING : PADDING + 3] == bytes(3)
    content[PADDING : PADDING + 3] = LEFT
    two.write_bytes(content)
    assert without_accidents(one) > 0
    assert without_accidents(two) > 0
    assert one.read_bytes() == two.read_bytes()
    assert read_bmodel(one).time.startswith("Thu Jan  1 00:00:00 1970")
    # Nothing else has changed, and once is enough.
    changed = sum(a != b for a, b in zip(one.read_bytes(), BMODEL.read_bytes(), strict=True))
    assert changed <= len(time)
    assert without_accidents(one) == 0


def test_inspect_shows_a_bmodel() -> None:
    shown = describe(BMODEL)
    assert shown.format == "bmodel"
    assert shown.metadata["chip"] == "BM1684X"
    assert shown.metadata["net 0 lm_head"] == (
        "hidden_states bfloat16 [1, 128] -> token_id int32 [1, 1]"
    )


@pytest.mark.parametrize("length", [0, 3, 64, 5000, 80000])
def test_a_file_that_was_cut_off_is_an_error(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.bmodel"
    path.write_bytes(BMODEL.read_bytes()[:length])
    with pytest.raises(FormatError, match=r"is no bmodel|as long as"):
        read_bmodel(path)


def test_a_damaged_description_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    content = BMODEL.read_bytes()
    path = tmp_path / "damaged.bmodel"
    messages = []
    for at in range(64, 400, 4):
        path.write_bytes(content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :])
        with contextlib.suppress(FormatError):
            summary(read_bmodel(path))
            continue
        messages.append(at)
    assert len(messages) > 20
