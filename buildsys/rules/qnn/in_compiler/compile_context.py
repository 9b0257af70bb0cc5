"""python compile_context.py REQUEST: one graph to one context binary, in a process of its own.

The first compilation of a process gives the same bytes each time, later ones do not; and the
model's path, relative here, goes into them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(file: str) -> None:
    """Request: name, options (the provider's). Reads NAME.json and NAME.npz, writes NAME.onnx,
    NAME_ctx.onnx and the binary that it names."""
    from htp_session import open_session  # beside this program, not in a package
    from onnx_writer import write_onnx

    request = json.loads(Path(file).read_text(encoding="utf-8"))
    name = request["name"]
    write_onnx(f"{name}.json", f"{name}.npz", f"{name}.onnx")
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": f"{name}_ctx.onnx",
        "ep.context_embed_mode": "0",
    }
    open_session(f"{name}.onnx", request["options"], entries)


if __name__ == "__main__":
    main(sys.argv[1])
