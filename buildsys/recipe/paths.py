"""Paths in recipes and on the command line: who they are relative to.

Names are put together as text, never resolved through links: "a/../b" stays inside its
recipe, and a message shows the path as the user wrote it.
"""
# pathlib has no lexical normalisation, and costs 9 ms at start-up:
# ruff: noqa: PTH100, PTH109, PTH111, PTH112, PTH113, PTH118, PTH119, PTH120, PTH208

from __future__ import annotations

import os

from buildsys.share import shared_folder


def absolute(path: str, folder: str) -> str:
    """`path` as an absolute path, seen from `folder`; "~" is the user's home."""
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def here(path: str) -> str:
    """`path` as an absolute path, seen from the current folder."""
    return absolute(path, os.getcwd())


def folder_of(file: str) -> str:
    """The folder a file is in, as it was written: "" for the current one."""
    return os.path.dirname(file)


def beside(file: str, word: str) -> str:
    """The path that `word` names when it stands in `file`, relative where both are."""
    return os.path.normpath(os.path.join(os.path.dirname(file), os.path.expanduser(word)))


def real(path: str) -> str:
    return os.path.realpath(path)


def is_file(path: str) -> bool:
    return os.path.isfile(path)


def is_folder(path: str) -> bool:
    return os.path.isdir(path)


def base(path: str) -> str:
    return os.path.basename(path)


def installed_recipe(word: str) -> str | None:
    """The path of a recipe that qbuild ships: "qwen2vl.yaml" or "recipes/qwen2vl.yaml"."""
    name = word.removeprefix("recipes/")
    if os.path.basename(name) != name:
        return None
    path = os.path.join(shared_folder("recipes"), name)
    return path if os.path.isfile(path) else None


def installed_model(name: str) -> str | None:
    """The folder of a model that qbuild ships (recipes/assets/NAME), or None."""
    if not name or os.path.basename(name) != name or name in (".", ".."):
        return None
    path = os.path.join(shared_folder("recipes"), "assets", name)
    return path if os.path.isfile(os.path.join(path, "config.json")) else None


def installed_models() -> list[str]:
    """The names of the models that qbuild ships."""
    folder = os.path.join(shared_folder("recipes"), "assets")
    return [name for name in entries(folder) if installed_model(name) is not None]


def recipes_in(folder: str) -> list[str]:
    """File names of the recipes in a folder, sorted."""
    return [name for name in entries(folder) if name.endswith(".yaml")]


def entries(folder: str) -> list[str]:
    """Names in a folder, sorted; none where there is no such folder."""
    try:
        return sorted(os.listdir(folder or "."))
    except OSError:
        return []
