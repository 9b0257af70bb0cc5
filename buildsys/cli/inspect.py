"""`qbuild inspect FILE`: the tensors, types and metadata of a file, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING

from buildsys.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from buildsys.formats.description import Description, TensorLine

NAME_AT_LEAST = 24  # columns of a name that are left in a narrow window
VALUE_AT_MOST = 300  # characters of a metadata value in the table; JSON has all


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help=".safetensors, .pth, .bin, .mllm, .gguf, an index, a folder of these, a QNN context, "
        "or an ELF file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print what is in the file; returns 0."""
    if not os.path.exists(args.file):
        raise UsageError(f"there is no {args.file}")
    from buildsys.formats.description import describe  # torch: only when something is inspected

    description = describe(args.file, _qnn_library)
    if args.json:
        print(json.dumps(as_json(description), indent=1, ensure_ascii=False, default=str))
        return 0
    # A pipe gets whole names; a window gets lines that fit it.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(table(description, width)))
    return 0


def _qnn_library() -> str | None:
    """libQnnSystem.so of the toolchain, where `qbuild toolchain install` or a variable has it."""
    from buildsys.formats.qnn_binary import LIBRARY
    from buildsys.share import shared_folder
    from buildsys.toolchains.finding import find_toolchains

    name = "onnxruntime-qnn"
    found = find_toolchains([name], [shared_folder("toolchains")], os.environ).found
    return os.path.join(found[name].fields["root"], LIBRARY) if name in found else None


def as_json(description: Description) -> dict[str, object]:
    """Everything that is known of the file, as plain values."""
    return {
        "path": str(description.path),
        "format": description.format,
        "tensors": [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes}
            for t in description.tensors
        ],
        "totals": {
            kind: {"tensors": count, "bytes": nbytes}
            for kind, (count, nbytes) in description.totals().items()
        },
        "metadata": dict(description.metadata),
    }


def table(description: Description, width: int | None) -> Iterator[str]:
    """The lines of the table, at most `width` columns wide (None: as wide as the names)."""
    yield f"{description.path}: {description.format}"
    if description.tensors:
        yield ""
        yield from _tensor_lines(description.tensors, width)
        yield ""
        yield from _total_lines(description)
    if description.metadata:
        yield ""
        for key, value in description.metadata.items():
            yield _fit(f"{printable(key)}: {_value(value)}", width)


def printable(text: str) -> str:
    """The text with control characters escaped: names come from files that strangers made."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(nbytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def _tensor_lines(tensors: Sequence[TensorLine], width: int | None) -> Iterator[str]:
    rows = [("tensor", "type", "shape", "size")]
    rows += [(printable(t.name), t.type, _shape(t.shape), size(t.nbytes)) for t in tensors]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    if width is not None:
        others = sum(widths[1:]) + 2 * 3
        widths[0] = max(NAME_AT_LEAST, min(widths[0], width - others))
    for name, kind, shape, nbytes in rows:
        name = _elide(name, widths[0])
        cells = f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:>{widths[2]}}"
        yield f"{cells}  {nbytes:>{widths[3]}}"


def _total_lines(description: Description) -> Iterator[str]:
    totals = description.totals()
    for kind, (count, nbytes) in totals.items():
        yield f"{kind}: {_tensors(count)}, {size(nbytes)}"
    if len(totals) > 1:
        nbytes = sum(t.nbytes for t in description.tensors)
        yield f"together: {_tensors(len(description.tensors))}, {size(nbytes)}"


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def _value(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} items"
    text = printable(value if isinstance(value, str) else str(value))
    return text if len(text) <= VALUE_AT_MOST else f"{text[:VALUE_AT_MOST]}…"


def _elide(name: str, width: int) -> str:
    """The name with its middle left out: what tells tensors apart is at both ends."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _fit(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"
