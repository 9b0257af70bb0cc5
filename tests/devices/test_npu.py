"""A .mxq goes to the NPU that it was compiled for: the runtime on the device is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from buildsys.devices.errors import DeviceRefused
from buildsys.devices.npu import with_npus
from buildsys.devices.payload import PushFile
from buildsys.plan.load import load_plan
from tests.devices.targets import Target

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "mobilint.yaml"


class Runtime:
    """A module with qbruntime's name and its one function, where the device's python3 looks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "qbruntime" / "__init__.py"

    def says(self, body: str) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(f"def get_available_devices():\n    {body}\n")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    folder = tmp_path / "device" / "python"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # it is rewritten within one second
    return Runtime(folder)


def compiled(target: Target, *npus: str) -> PushFile:
    return target.file("model/text.mxq", b".MXQ")._replace(npus=frozenset(npus))


def test_a_model_for_another_npu_is_refused(local: Target, runtime: Runtime) -> None:
    runtime.says("return ['regulus-ra']")
    for dry_run in (True, False):
        with pytest.raises(DeviceRefused) as caught:
            local.deploy(compiled(local, "aries-rb"), dry_run=dry_run)
        told = "model/text.mxq is for aries-rb, and the device has regulus-ra"
        assert told in caught.value.message
        assert local.content() == {}
    runtime.says("return []")
    with pytest.raises(DeviceRefused, match="qbruntime finds no NPU there"):
        local.deploy(compiled(local, "aries-rb"))


@pytest.mark.parametrize(
    ("npu", "there"),
    [
        ("aries-rb", "['aries-rb', 'aries-rb']"),
        ("regulus-rb", "['aries-rb', 'regulus-rb-usb']"),
        ("regulus-rb-usb", "['regulus-rb']"),
        ("aries2", "['ARIES-RB']"),
    ],
)
def test_one_of_several_npus_fits(local: Target, runtime: Runtime, npu: str, there: str) -> None:
    runtime.says(f"print('a log line'); return {there}")
    assert local.deploy(compiled(local, npu)) == 0
    assert local.notes.of("unchecked") == []


def test_a_runtime_that_cannot_say_is_told_and_refuses_nothing(
    local: Target, runtime: Runtime
) -> None:
    def told() -> str:
        assert local.deploy(compiled(local, "aries-rb")) == 0
        (text,) = (text for text in local.notes.texts if "not checked" in text)
        return text

    assert "its python3 has no qbruntime" in told()
    runtime.says("raise RuntimeError('Driver_NotInitialized')")
    assert "RuntimeError Driver_NotInitialized" in told()
    runtime.path.write_text("")  # before 1.5
    assert "AttributeError" in told()
    runtime.path.write_text("import os; os.abort()")
    assert "python3 there failed" in told()


def test_a_device_that_gets_no_mxq_is_not_asked(local: Target, runtime: Runtime) -> None:
    runtime.says("open(__file__ + '.asked', 'w')")
    assert local.deploy(local.file("a", b"1"), compiled(local)) == 0
    assert not Path(f"{runtime.path}.asked").exists()
    assert local.deploy(compiled(local, "aries-rb")) == 0
    assert Path(f"{runtime.path}.asked").exists()


def test_what_a_model_was_compiled_for_is_known_through_its_folder(local: Target) -> None:
    """The journal counts: --no-build may deploy what an older recipe compiled."""
    plan, _ = load_plan(str(RECIPE), {})
    (text,) = [name for name in plan.steps if name.endswith("_text.mxq")]
    inside = local.file("model/Qwen2-VL_text.mxq", b".MXQ", artifact="deploy/")
    config = local.file("model/config.json", b"{}", artifact="deploy/")
    alone = local.file("other.mxq", b".MXQ", artifact="someone's")
    npus = [file.npus for file in with_npus(plan, {}, [inside, config, alone])]
    assert npus == [{"aries-rb"}, set(), set()]
    older = {text: {"parts": {"options": {"target_device": "regulus-ra"}}}}
    (both,) = with_npus(plan, older, [inside])
    assert both.npus == {"aries-rb", "regulus-ra"}
    (own,) = with_npus(plan, older, [local.file(text, b".MXQ", artifact=text)])
    assert own.npus == {"regulus-ra"}
