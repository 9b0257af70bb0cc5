"""A package index in a folder: wheels made here, which pip takes instead of PyPI's."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path


def make_wheel(folder: Path, name: str, version: str, text: str = "", needs: str = "") -> Path:
    """A wheel with one module `name` and a script of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": text or f'VERSION = "{version}"\n\n\ndef main():\n    print(VERSION)\n',
        f"{info}/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def environment_for(folder: Path, cache: Path) -> dict[str, str]:
    """This process's environment, with pip told to look nowhere else and qbuild to put what it
    installs into `cache`."""
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    return {**os.environ, **pip, "QBUILD_CACHE": str(cache), "COLUMNS": "80"}
