"""qbcompiler 1.1 and later: options are objects with model_validate, which forbid extra fields."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from standin.recording import compile_mxq, need, need_one_of, need_type

Shape = dict[str, Any]
ANYTHING: Shape = {}
TRANSFORMS: Shape = {
    "QK": {"apply": bool},
    "UD": {"apply": bool, "learn": bool},
    "SpinR1": {"apply": bool},
    "SpinR2": {"apply": bool},
    "HeadOutChRotation": {"apply": bool, "matrixPath": str},
}
BIT: Shape = {"layerOverrides": {"activation16Bits": list}}
CALIBRATION: Shape = {"method": int, "output": int, "mode": int}
COMPILE: Shape = {
    "bit": BIT,
    "calibration": CALIBRATION,
    "equivalentTransformation": TRANSFORMS,
    "inferenceScheme": str,
    "llm": dict,
    "searchWeightScale": dict,
    "hessianQuant": dict,
    "layerBiasCorrection": dict,
}
DEVICES = ("gpu", "cpu")
SCHEMES = ("single", "multi", "global4", "global8", "all")
TARGETS = ("aries-rb", "regulus-ra", "regulus-rb", "regulus-rb-usb")


def validate(values: Any, shape: Shape, where: str) -> dict[str, Any]:
    """As pydantic does with extra="forbid"."""
    need_type(where, values, dict)
    for name, value in values.items():
        need(name in shape, f"{where} has no field {name!r}")
        kind = shape[name]
        if isinstance(kind, dict):
            validate(value, kind, f"{where}.{name}")
        else:
            need_type(f"{where}.{name}", value, kind)
    found: dict[str, Any] = values
    return found


class Config:
    shape: Shape = ANYTHING

    def __init__(self, **values: Any) -> None:
        self.values = validate(values, self.shape, type(self).__name__)

    @classmethod
    def model_validate(cls, values: Any) -> Config:
        return cls(**values)


class CompileConfig(Config):
    shape = COMPILE


class BitConfig(Config):
    shape = BIT


class CalibrationConfig(Config):
    shape = CALIBRATION


class EquivalentTransformationConfig(Config):
    shape = TRANSFORMS


def _compile(mblt: str, save_path: str, calib: str, call: dict[str, Any]) -> None:
    need_one_of("device", call["device"], *DEVICES)
    need_one_of("inference_scheme", call["inference_scheme"], *SCHEMES)
    need(set(call["transforms"]) <= set(TRANSFORMS), "transforms")
    compile_mxq(mblt, save_path, calib, ".", call)


def mxq_compile_1_1(
    model: str,
    *,
    save_path: str,
    calib_data_path: str,
    device: str,
    inference_scheme: str,
    compile_config: CompileConfig,
) -> None:
    need_type("compile_config", compile_config, CompileConfig)
    values = compile_config.values
    call = {
        "version": "1.1",
        "device": device,
        "inference_scheme": inference_scheme,
        "config": values,
        "transforms": values.get("equivalentTransformation", {}),
    }
    _compile(model, save_path, calib_data_path, call)


def mxq_compile_1_2(
    model: str,
    *,
    save_path: str,
    calib_data_path: str,
    device: str,
    inference_scheme: str,
    target_device: str,
    bit_config: BitConfig | None = None,
    equivalent_transformation_config: EquivalentTransformationConfig | None = None,
    calibration_config: CalibrationConfig | None = None,
    compile_config: CompileConfig | None = None,
) -> None:
    need_one_of("target_device", target_device, *TARGETS)
    values: dict[str, Any] = {}
    if compile_config is not None:
        need_type("compile_config", compile_config, CompileConfig)
        values = dict(compile_config.values)
    given = (
        ("bit", bit_config, BitConfig),
        (
            "equivalentTransformation",
            equivalent_transformation_config,
            EquivalentTransformationConfig,
        ),
        ("calibration", calibration_config, CalibrationConfig),
    )
    for name, each, kind in given:
        if each is not None:
            need_type(name, each, kind)
            values[name] = each.values
    call = {
        "version": "1.2",
        "device": device,
        "inference_scheme": inference_scheme,
        "target_device": target_device,
        "config": values,
        "transforms": values.get("equivalentTransformation", {}),
    }
    _compile(model, save_path, calib_data_path, call)


def command_line() -> None:
    """`python -m qbcompiler quantize` of 1.3, its events as JSON lines."""
    parser = argparse.ArgumentParser(prog="qbcompiler", allow_abbrev=False)
    quantize = parser.add_subparsers(required=True).add_parser("quantize", allow_abbrev=False)
    quantize.add_argument("--mblt", required=True)
    quantize.add_argument("--output", required=True)
    quantize.add_argument("--target-device", required=True, choices=TARGETS)
    quantize.add_argument("--calib-data-path", action="append", required=True)
    quantize.add_argument("--compile-config", required=True)
    quantize.add_argument("--device", required=True, choices=DEVICES)
    given = parser.parse_args()

    def say(**event: Any) -> None:
        need(os.environ.get("QBCOMPILER_JSONL") == "1", "the caller asks for JSON lines")
        print(json.dumps(event), flush=True)

    say(type="progress", current=0, total=2)
    try:
        content = json.loads(Path(given.compile_config).read_text(encoding="utf-8"))
        values = CompileConfig.model_validate(content).values
        call = {
            "version": "1.3 command line",
            "device": given.device,
            "inference_scheme": values["inferenceScheme"],
            "target_device": given.target_device,
            "config": values,
            "transforms": values.get("equivalentTransformation", {}),
        }
        _compile(given.mblt, given.output, given.calib_data_path[0], call)
    except TypeError as error:
        say(type="error", message=f"ERROR [E_CONFIG]: {error}")
        sys.exit(2)
    say(type="progress", current=2, total=2)
    say(type="result", message="written")
