"""A session of onnxruntime on HTP: on x86 Qualcomm's compiler and its emulator.

Runs in the compiler's Python. Nothing may fall back to the CPU: a node that HTP does not take
ends the session with an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROVIDER = "QNNExecutionProvider"


def open_session(
    model: str, options: Mapping[str, str], entries: Mapping[str, str] | None = None
) -> Any:
    """An InferenceSession for a model file. options: the provider's (htp_arch, soc_model ...);
    entries: of the session. The path is part of what a context's bytes depend on."""
    import onnxruntime
    import onnxruntime_qnn

    name, library = onnxruntime_qnn.get_ep_name(), onnxruntime_qnn.get_library_path()
    onnxruntime.register_execution_provider_library(name, library)
    devices = [each for each in onnxruntime.get_ep_devices() if each.ep_name == PROVIDER]
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    told = {"session.disable_cpu_ep_fallback": "1", **(entries or {})}
    for key, value in told.items():
        session_options.add_session_config_entry(key, value)
    own = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **options}
    session_options.add_provider_for_devices(devices[:1], own)
    return onnxruntime.InferenceSession(model, session_options)
