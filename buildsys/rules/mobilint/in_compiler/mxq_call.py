"""Calls mxq_compile, in the way of the generation that is installed.

The request holds: module, config ("functions", "compile-config", "sub-configs"), names,
keywords, calibration, activation_16bits, transforms, function_transforms, nested, llm_config,
extra; and the paths mblt, save_path, calib_data_path.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    compiler = importlib.import_module(request["module"])
    configs = {
        "functions": by_functions,
        "compile-config": by_compile_config,
        "sub-configs": by_sub_configs,
    }[request["config"]](compiler, request)
    compiler.mxq_compile(
        request["mblt"],
        save_path=request["save_path"],
        calib_data_path=request["calib_data_path"],
        **request["keywords"],
        **configs,
    )


def by_functions(compiler: Any, request: dict[str, Any]) -> dict[str, Any]:
    """qubee 0.11 and 0.12, qbcompiler 1.0: configs are made by functions."""
    calibration = compiler.get_calibration_config(**request["calibration"])
    bits = compiler.get_bit_config(activation_16bits=request["activation_16bits"])
    transformation = compiler.get_equivalent_transformation_config(**request["function_transforms"])
    quantization, advanced = request["names"]
    configs = {
        quantization: compiler.get_quantization_config(calibration, bits),
        advanced: compiler.get_advanced_quantization_config(
            equivalent_transformation=transformation
        ),
    }
    if request["llm_config"]:
        configs["llm_config"] = compiler.get_llm_config()
    return configs


def by_compile_config(compiler: Any, request: dict[str, Any]) -> dict[str, Any]:
    """qbcompiler 1.1: one nested config."""
    configs = importlib.import_module(request["module"] + ".configs")
    return {"compile_config": configs.CompileConfig.model_validate(request["nested"])}


def by_sub_configs(compiler: Any, request: dict[str, Any]) -> dict[str, Any]:
    """qbcompiler 1.2 and later: one config object each, or all in one where the recipe adds
    fields that have no object of their own here."""
    if request["extra"]:
        return by_compile_config(compiler, request)
    nested = request["nested"]
    configs = {
        "bit_config": compiler.BitConfig.model_validate(nested["bit"]),
        "equivalent_transformation_config": compiler.EquivalentTransformationConfig.model_validate(
            nested["equivalentTransformation"]
        ),
    }
    if "calibration" in nested:
        configs["calibration_config"] = compiler.CalibrationConfig(**nested["calibration"])
    return configs


if __name__ == "__main__":
    main()
