"""Which interface a version of Mobilint's compiler has.

Source: the vendor's tutorial (mblt-sdk-tutorial, tags v0.11.0.1 to v1.1.2 and later) and its
compiler's release notes. What differs between tags is written down here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from buildsys.errors import StepError
from buildsys.toolchains.versions import version_of

Part = Literal["language", "vision"]


class Generation(NamedTuple):
    """One interface of the compiler.

    since: the first version that has it. module: the Python package. config: how options are
    given: by get_..._config() functions, by one CompileConfig, or by one config object each.
    keywords: what mxq_compile calls the quantization and the advanced config (functions only).
    gpu, cpu: its names for devices; None: it is documented for GPUs alone.
    schemes: the tutorial's inference scheme by part. rotation_root: where it writes
    spinWeight/; "." is the working folder. model_dict: the package of the parser.
    target: whether mxq_compile takes target_device. parser_target: what the parser calls
    aries-rb. wrapper: Qwen2-VL comes as the vendor's own subclass.
    """

    since: tuple[int, ...]
    module: str
    config: Literal["functions", "compile-config", "sub-configs"]
    keywords: tuple[str, str]
    gpu: str
    cpu: str | None
    schemes: Mapping[str, str]
    rotation_root: str
    model_dict: str
    llm_config: bool = False
    single_core: bool = False
    calibration: Mapping[str, Mapping[str, int]] = {}
    target: bool = False
    parser_target: str = "aries2"
    wrapper: bool = False
    mblt_compile: bool = False
    command_line: bool = False


OLD_SCHEMES = {"language": "single", "vision": "multi"}
ALL = {"language": "all", "vision": "all"}

GENERATIONS = (
    Generation(
        since=(0, 11),
        module="qubee",
        config="functions",
        keywords=("quantization", "advanced_quantization"),
        gpu="cuda",
        cpu=None,
        schemes=OLD_SCHEMES,
        rotation_root="/tmp/qubee",
        model_dict="qubee.model_dict",
        llm_config=True,
        single_core=True,
        # 1 is max-percentile as a mode, and one range per channel as an output.
        calibration={"language": {"mode": 1}, "vision": {"output": 1}},
    ),
    Generation(
        since=(0, 12),
        module="qubee",
        config="functions",
        keywords=("quantization_config", "advanced_quantization_config"),
        gpu="cuda",
        cpu=None,
        schemes=OLD_SCHEMES,
        rotation_root="/tmp/qubee",
        model_dict="qubee.model_dict",
        single_core=True,
    ),
    Generation(
        since=(1, 0),
        module="qbcompiler",
        config="functions",
        keywords=("quantization_config", "advanced_quantization_config"),
        gpu="cuda",
        cpu=None,
        schemes=OLD_SCHEMES,
        rotation_root="/tmp/qbcompiler",
        model_dict="qbcompiler.model_dict",
    ),
    Generation(
        since=(1, 1),
        module="qbcompiler",
        config="compile-config",
        keywords=("", ""),
        gpu="gpu",
        cpu="cpu",
        schemes=ALL,
        rotation_root=".",
        model_dict="qbcompiler.model_dict",
        wrapper=True,
    ),
    Generation(
        since=(1, 2),
        module="qbcompiler",
        config="sub-configs",
        keywords=("", ""),
        gpu="gpu",
        cpu="cpu",
        schemes=ALL,
        rotation_root=".",
        model_dict="qbcompiler.model_dict",
        target=True,
        parser_target="aries-rb",
        wrapper=True,
        mblt_compile=True,
    ),
    Generation(
        since=(1, 3),
        module="qbcompiler",
        config="sub-configs",
        keywords=("", ""),
        gpu="gpu",
        cpu="cpu",
        schemes=ALL,
        rotation_root=".",
        model_dict="qbcompiler.model_dict_legacy",
        target=True,
        parser_target="aries-rb",
        wrapper=True,
        mblt_compile=True,
        command_line=True,
    ),
)


def generation_of(distribution: str, version: str) -> Generation:
    """The interface of an installed compiler. Raises StepError for one that is too old, or
    whose name and version do not belong together."""
    numbers = version_of(version)
    fitting = [each for each in GENERATIONS if numbers >= each.since]
    if not fitting:
        raise StepError(
            f"{distribution} {version} is older than all that are known (0.11)",
            remedy="Install a later compiler.",
        )
    found = fitting[-1]
    if found.module != distribution:
        raise StepError(
            f"{distribution} {version}: a compiler of this version is called {found.module}",
            remedy="The installation is damaged: reinstall the compiler.",
        )
    return found
