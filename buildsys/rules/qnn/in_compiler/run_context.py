"""python run_context.py REQUEST: runs a compiled context on the feeds of an .npz."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(file: str) -> None:
    """Request: model (NAME_ctx.onnx), options, feeds and results (.npz files; the arrays of run
    N are called N/TENSOR)."""
    from htp_session import open_session  # beside this program, not in a package

    request = json.loads(Path(file).read_text(encoding="utf-8"))
    session = open_session(request["model"], request["options"])
    outputs = [each.name for each in session.get_outputs()]
    results = {}
    with np.load(request["feeds"]) as arrays:
        for run in range(request["runs"]):
            feeds = {each.name: arrays[f"{run}/{each.name}"] for each in session.get_inputs()}
            made = session.run(outputs, feeds)
            results.update({f"{run}/{name}": a for name, a in zip(outputs, made, strict=True)})
    np.savez(request["results"], **results)


if __name__ == "__main__":
    main(sys.argv[1])
