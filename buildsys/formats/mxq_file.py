"""What a .mxq says of itself, by the vendor's runtime where that is installed.

The container is Mobilint's own and not documented; it begins with ".MXQ". `qbruntime` (PyPI:
mobilint-qb-runtime) reads it without a card, and gives a text: target, core modes, shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

from buildsys.formats.errors import FormatError

MXQ_MAGIC = b".MXQ"
HOW = "pip install mobilint-qb-runtime, which reads it without a card"


def read_mxq_summary(path: str | PathLike[str]) -> Mapping[str, object]:
    """The runtime's summary under "summary"; without the runtime, how to get one.

    Raises FormatError for a file that the runtime cannot read.
    """
    size = Path(path).stat().st_size
    try:
        import qbruntime
    except ImportError:
        return {"bytes": size, "summary": f"not read: {HOW}"}
    # Its reasons go to standard error; the text is empty then.
    summary = qbruntime.get_model_summary(fspath(path))
    if not summary:
        raise FormatError(
            "begins like an mxq, and Mobilint's runtime cannot read it",
            file=path,
            remedy="It is damaged, or made by a compiler newer than this qbruntime.",
        )
    lines = [line.rstrip() for line in str(summary).splitlines() if line.strip()]
    return {"bytes": size, "summary": lines}
