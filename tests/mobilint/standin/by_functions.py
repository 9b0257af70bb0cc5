"""qubee 0.11 and 0.12, qbcompiler 1.0: options are made by get_..._config() functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from standin.recording import compile_mxq, need, need_one_of, need_type


class Config:
    """What a get_..._config() gives: opaque, and of one kind."""

    def __init__(self, kind: str, values: dict[str, Any]) -> None:
        self.kind, self.values = kind, values


def get_calibration_config(*, mode: int | None = None, output: int | None = None) -> Config:
    for name, value in (("mode", mode), ("output", output)):
        if value is not None:
            need_one_of(name, value, 0, 1, 2)
    values = {"mode": mode, "output": output}
    return Config("calibration", {k: v for k, v in values.items() if v is not None})


def get_bit_config(*, activation_16bits: list[str]) -> Config:
    need_type("activation_16bits", activation_16bits, list)
    for each in activation_16bits:
        need_type("a layer", each, str)
    return Config("bit", {"activation_16bits": activation_16bits})


def get_quantization_config(calibration: Config, bit: Config) -> Config:
    need(calibration.kind == "calibration" and bit.kind == "bit", "calibration, then bits")
    return Config("quantization", {**calibration.values, **bit.values})


def get_equivalent_transformation_config(
    *,
    qk_apply: bool = False,
    ud_apply: bool = False,
    ud_learn: bool = False,
    spin_r1_apply: bool = False,
    spin_r2_apply: bool = False,
    head_out_ch_rotation_apply: bool = False,
    head_out_ch_rotation_matrix_path: str = "",
) -> Config:
    flags = (qk_apply, ud_apply, ud_learn, spin_r1_apply, spin_r2_apply, head_out_ch_rotation_apply)
    for flag in flags:
        need_type("a flag", flag, bool)
    need_type("the matrix path", head_out_ch_rotation_matrix_path, str)
    transforms: dict[str, dict[str, Any]] = {
        "QK": {"apply": qk_apply},
        "UD": {"apply": ud_apply, "learn": ud_learn},
        "SpinR1": {"apply": spin_r1_apply},
        "SpinR2": {"apply": spin_r2_apply},
        "HeadOutChRotation": {
            "apply": head_out_ch_rotation_apply,
            "matrixPath": head_out_ch_rotation_matrix_path,
        },
    }
    return Config("transformation", {k: v for k, v in transforms.items() if v["apply"]})


def get_advanced_quantization_config(*, equivalent_transformation: Config) -> Config:
    need(equivalent_transformation.kind == "transformation", "an equivalent transformation")
    return Config("advanced", equivalent_transformation.values)


def get_llm_config() -> Config:
    return Config("llm", {})


def _compile(
    version: str, spin_weight: str, mblt: str, paths: dict[str, str], given: dict[str, Any]
) -> None:
    need_one_of("device", given["device"], "cuda")
    need_one_of("inference_scheme", given["inference_scheme"], "single", "multi")
    need(given["quantization"].kind == "quantization", "a quantization config")
    need(given["advanced"].kind == "advanced", "an advanced quantization config")
    call = {
        "version": version,
        "device": given["device"],
        "inference_scheme": given["inference_scheme"],
        "singlecore_compile": given.get("singlecore_compile"),
        "llm_config": given.get("llm_config") is not None,
        "quantization": given["quantization"].values,
        "transforms": given["advanced"].values,
    }
    compile_mxq(mblt, paths["save_path"], paths["calib_data_path"], spin_weight, call)


def qubee_0_11() -> Callable[..., None]:
    def mxq_compile(
        model: str,
        *,
        save_path: str,
        calib_data_path: str,
        device: str,
        inference_scheme: str,
        quantization: Config,
        advanced_quantization: Config,
        singlecore_compile: bool = False,
        llm_config: Config | None = None,
    ) -> None:
        need_type("singlecore_compile", singlecore_compile, bool)
        need(llm_config is None or llm_config.kind == "llm", "llm_config")
        paths = {"save_path": save_path, "calib_data_path": calib_data_path}
        given = {
            "device": device,
            "inference_scheme": inference_scheme,
            "quantization": quantization,
            "advanced": advanced_quantization,
            "singlecore_compile": singlecore_compile,
            "llm_config": llm_config,
        }
        _compile("0.11", "/tmp/qubee", model, paths, given)

    return mxq_compile


def qubee_0_12() -> Callable[..., None]:
    def mxq_compile(
        model: str,
        *,
        save_path: str,
        calib_data_path: str,
        device: str,
        inference_scheme: str,
        quantization_config: Config,
        advanced_quantization_config: Config,
        singlecore_compile: bool = False,
    ) -> None:
        need_type("singlecore_compile", singlecore_compile, bool)
        paths = {"save_path": save_path, "calib_data_path": calib_data_path}
        given = {
            "device": device,
            "inference_scheme": inference_scheme,
            "quantization": quantization_config,
            "advanced": advanced_quantization_config,
            "singlecore_compile": singlecore_compile,
        }
        _compile("0.12", "/tmp/qubee", model, paths, given)

    return mxq_compile


def qbcompiler_1_0() -> Callable[..., None]:
    def mxq_compile(
        model: str,
        *,
        save_path: str,
        calib_data_path: str,
        device: str,
        inference_scheme: str,
        quantization_config: Config,
        advanced_quantization_config: Config,
    ) -> None:
        paths = {"save_path": save_path, "calib_data_path": calib_data_path}
        given = {
            "device": device,
            "inference_scheme": inference_scheme,
            "quantization": quantization_config,
            "advanced": advanced_quantization_config,
        }
        _compile("1.0", "/tmp/qbcompiler", model, paths, given)

    return mxq_compile
