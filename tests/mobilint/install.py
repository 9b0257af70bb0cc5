"""Puts a stand-in of one generation of the compiler into a folder, as pip would lay it out."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

SOURCE = Path(__file__).parent / "standin"
VERSIONS = {
    "0.11": ("qubee", "0.11.0.1+aries2"),
    "0.12": ("qubee", "0.12.0.0+aries2"),
    "1.0": ("qbcompiler", "1.0.2+aries2"),
    "1.1": ("qbcompiler", "1.1.2+aries2"),
    "1.2": ("qbcompiler", "1.2.0"),
    "1.3": ("qbcompiler", "1.3.0"),
}
FUNCTIONS = (
    "get_advanced_quantization_config, get_bit_config, get_calibration_config, "
    "get_equivalent_transformation_config, get_quantization_config"
)
CONFIGS = "BitConfig, CalibrationConfig, CompileConfig, EquivalentTransformationConfig"
OLD = "LanguageModelForQwen2VL"
NEW = (
    "CachedQwen2VLTextRotaryEmbedding, Projection, Qwen2VL_get_image_features, "
    "Qwen2VLForConditionalGenerationWrapper, Qwen2VLModel_get_image_feature"
)
BOTH = "VisionModelForQwen2VL, repreprocess_pixel_values"


def install(generation: str, folder: Path) -> Path:
    """The folder, which belongs on a Python's path afterwards."""
    package, version = VERSIONS[generation]
    shutil.copytree(SOURCE, folder / "standin", ignore=shutil.ignore_patterns("__pycache__"))
    modules = {"__init__": _top(generation), **_model_dict(generation)}
    if generation in ("1.1", "1.2", "1.3"):
        modules["configs"] = "from standin.by_configs import CompileConfig\n"
    if generation == "1.3":
        modules["__main__"] = "from standin.by_configs import command_line\ncommand_line()\n"
    for name, text in modules.items():
        file = folder / package / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in [file.parent, *file.parent.parents]:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
        file.write_text(text, encoding="utf-8")
    _write_info(folder, package, version)
    return folder


def _top(generation: str) -> str:
    if generation in ("0.11", "0.12", "1.0"):
        made = {"0.11": "qubee_0_11", "0.12": "qubee_0_12", "1.0": "qbcompiler_1_0"}[generation]
        more = ", get_llm_config" if generation == "0.11" else ""
        lines = [
            f"from standin.by_functions import {FUNCTIONS}{more}",
            f"from standin.by_functions import {made}",
            f"mxq_compile = {made}()",
        ]
    elif generation == "1.1":
        lines = [
            "from standin.by_configs import BitConfig, CalibrationConfig",
            "from standin.by_configs import mxq_compile_1_1 as mxq_compile",
        ]
    else:
        lines = [
            f"from standin.by_configs import {CONFIGS}",
            "from standin.by_configs import mxq_compile_1_2 as mxq_compile",
            "from standin.graph import mblt_compile",
        ]
    return "\n".join(lines) + "\n"


def _model_dict(generation: str) -> dict[str, str]:
    root = "model_dict_legacy" if generation == "1.3" else "model_dict"
    classes = OLD if generation in ("0.11", "0.12", "1.0") else NEW
    parser = "ParserOf12 as ModelParser" if generation in ("1.2", "1.3") else "ModelParser"
    hf, torch = f"{root}.parser.backend.hf.util", f"{root}.parser.backend.torch"
    qwen = f"{root}.parser.backend.fx_hf_extensions.transformers.models.qwen2vl"
    pattern = f"{root}.parser.transform_operator.util"
    captures = "DefaultInputsCaptureContainer, InputCaptureCtxManager"
    return {
        f"{root}.common": "from standin.graph import DataFormat, LayerType, WeightDict\n",
        f"{root}.serialize": "from standin.graph import ChainedByteObj, SerializeMeta\n",
        f"{root}.parser.parser": f"from standin.graph import {parser}\n",
        pattern: "from standin.graph import check_sequential_pattern_strict_bwd\n",
        hf: f"from standin.tensors import {captures}\n",
        f"{torch}.util": "from standin.tensors import wrap_tensor\n",
        f"{torch}.object_wrapper": "from standin.tensors import set_attention_mask\n",
        qwen: f"from standin.qwen2vl import {classes}, {BOTH}\n",
    }


def _write_info(folder: Path, package: str, version: str) -> None:
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    files = sorted(file for file in folder.rglob("*.py"))
    lines = [
        f"{file.relative_to(folder)},sha256={hashlib.sha256(file.read_bytes()).hexdigest()},"
        for file in files
    ]
    (info / "RECORD").write_text("\n".join(lines) + "\n")
