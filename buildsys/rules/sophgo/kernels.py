"""What the compiler may keep between builds, below the store: kernels, and finished nets.

Both are named by everything that decides them, and can be made again. The compiler's own cache of
kernels would believe what a killed run has left half done; so each step works in a folder of
its own, to which whole kernels are lent, and from which they are taken when they are whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buildsys.rules.spec import StepContext

INDEX = "flag.txt"  # lines of "NAME STATUS"; the compiler believes in kernels with status 0
MOST = 8 << 30  # bytes of nets that are kept


def kernel_store(step: StepContext) -> Path | None:
    """Kernels of this version of the compiler; None without a store."""
    cache = step.toolchain.get("cache")
    return Path(cache) / "kernels" / step.toolchain["version"] if cache else None


def lend_kernels(step: StepContext, folder: Path) -> None:
    """Put links to all whole kernels into `folder`."""
    store = kernel_store(step)
    if store is None or not store.is_dir():
        return
    names = sorted(path.name for path in store.iterdir() if path.name.isdigit())
    for name in names:
        (folder / name).symlink_to(store / name)
    (folder / INDEX).write_text("".join(f"{name} 0\n" for name in names), encoding="utf-8")


def take_kernels(step: StepContext, folder: Path) -> None:
    """Move what was compiled since into the store. A full disk is no reason to fail."""
    store, index = kernel_store(step), folder / INDEX
    if store is None or not index.is_file():
        return
    lines = [line.split() for line in index.read_text(encoding="utf-8").splitlines()]
    try:
        store.mkdir(parents=True, exist_ok=True)
        for name in [words[0] for words in lines if words[1:] == ["0"] and words[0].isdigit()]:
            made = folder / name
            if made.is_symlink() or not made.is_dir() or (store / name).exists():
                continue
            fresh = store / f".{name}.{os.getpid()}"
            shutil.copytree(made, fresh)
            fresh.rename(store / name)
    except OSError:
        return  # another step was faster, or the disk is full


def net_store(step: StepContext) -> Path | None:
    """Where finished nets are kept; None without a store."""
    cache = step.toolchain.get("cache")
    if not cache:
        return None
    folder = Path(cache) / "nets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def drop_old_nets(folder: Path, most: int = MOST) -> None:
    """Remove what was not used for longest, until the rest is small enough."""
    sizes: list[tuple[float, int, Path]] = []
    for entry in folder.iterdir():
        try:
            size = sum(path.stat().st_size for path in entry.iterdir())
            sizes.append((entry.stat().st_mtime, size, entry))
        except OSError:
            continue  # another step removes it
    total = sum(size for _, size, _ in sizes)
    for _, size, path in sorted(sizes):
        if total <= most:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= size
