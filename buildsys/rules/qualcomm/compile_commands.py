"""compile_commands.json, for editors, from what make says that it would run.

Source: the Clang documentation, JSON Compilation Database Format Specification.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def compile_commands(dry_run: str, folder: Path) -> str:
    """The compilations among the lines of `make -n`. folder: the sources, where an editor has
    them open; what is compiled is relative to it."""
    entries = []
    for line in dry_run.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line)
        except ValueError:
            continue  # a line of a recipe that is no single command
        if "-c" not in words or "-o" not in words:
            continue
        # It names the folder that make ran in, which is gone by now.
        words = [word for word in words if not word.startswith("-fdebug-prefix-map=")]
        file, made = words[words.index("-c") + 1], words[words.index("-o") + 1]
        entry = {"directory": str(folder), "file": file, "output": made, "arguments": words}
        entries.append(entry)
    return json.dumps(entries, indent=1) + "\n"
