"""Where the folders that travel with qbuild are: recipes, templates, toolchains.

In a clone they lie beside the package, where people edit them; a wheel carries them below
the package. A user's own project folder may have folders of the same names, which win.
"""

from __future__ import annotations

import os

PACKAGE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (pathlib costs 9 ms at start-up)


def shared_folder(name: str) -> str:
    """Absolute path of the installed folder `name` ("recipes", "templates", "toolchains")."""
    beside = os.path.join(os.path.dirname(PACKAGE), name)  # noqa: PTH118, PTH120
    below = os.path.join(PACKAGE, "share", name)  # noqa: PTH118
    return below if os.path.isdir(below) else beside  # noqa: PTH112
