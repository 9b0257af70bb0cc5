"""`qbuild cache`: what the store holds, whether it is right, and what of it may go."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from buildsys.errors import QbuildError, UsageError

if TYPE_CHECKING:
    from buildsys.store.local import Store

KEEP = "30d"


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (summary, _) in WHATS.items():
        sub = verbs.add_parser(name, help=summary, description=summary)
        if name == "gc":
            sub.add_argument(
                "--keep",
                type=age,
                default=age(KEEP),
                metavar="TIME",
                help=f"keep what was used within this time (default: {KEEP})",
            )
            sub.add_argument("--max", type=size, metavar="SIZE", help="and no more than, as 50GiB")
        if name == "key":
            sub.add_argument("--new", action="store_true", help="make one")
        else:
            sub.add_argument("--json", action="store_true", help="for machines")


def age(word: str) -> float:
    from buildsys.recipe.quantities import seconds

    try:
        return seconds(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(word: str) -> int:
    from buildsys.recipe.quantities import memory_bytes

    try:
        return memory_bytes(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace) -> int:
    return WHATS[args.what][1](args)


def stats(args: argparse.Namespace) -> int:
    from buildsys.store.garbage import contents

    store = opened()
    found = contents(store)
    if args.json:
        print(json.dumps({"store": store.root, **found._asdict()}, indent=1))
        return 0
    print(f"store    {store.root}")
    print(f"steps    {found.records}")
    print(f"blobs    {found.blobs}, {amount(found.size)}, of that {amount(found.shared)} linked")
    print(f"folders  {len(found.folders)}")
    for folder in found.folders:
        print(f"  {folder}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read every blob; 1 where one was wrong."""
    from buildsys.store.garbage import verify as verify_store

    store = opened()
    found = verify_store(store)
    if args.json:
        print(json.dumps(found._asdict(), indent=1))
    else:
        for digest in found.wrong:
            print(f"removed {digest}: its bytes had changed")
        print(f"{found.blobs} blobs, {amount(found.size)}: {len(found.wrong)} wrong; ", end="")
        print(f"{len(found.lame)} steps can no longer be restored")
    return 1 if found.wrong else 0


def gc(args: argparse.Namespace) -> int:
    from buildsys.store.garbage import collect

    store = opened()
    gone = collect(store, keys_in_use, args.keep, args.max)
    if args.json:
        print(json.dumps(gone._asdict(), indent=1))
        return 0
    print(f"removed {gone.records} steps and {gone.blobs} blobs, {amount(gone.size)}")
    left = sum(found.st_size for _, found in store.blobs())
    if args.max is not None and left > args.max:
        print(f"{amount(left)} are left, for {amount(gone.kept)} are in use by build folders")
    return 0


def key(args: argparse.Namespace) -> int:
    """Where the key is that shared records are sealed with; --new makes one."""
    from buildsys.store.signing import key_file, make_key, read_key

    if args.new:
        print(f"made {make_key(os.environ)}: give it to those who share the cache, and nobody else")
        return 0
    path = key_file(os.environ)
    if read_key(os.environ) is None:
        raise UsageError(f"there is no key ({path})", remedy="qbuild cache key --new makes one")
    print(path)
    return 0


WHATS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "stats": ("what the store holds, and for whom", stats),
    "verify": ("read everything in the store, and remove what is damaged", verify),
    "gc": ("remove what has not been used for long; never what a build folder uses", gc),
    "key": ("the key that shared artifacts are sealed with", key),
}


def opened() -> Store:
    """The local store. Raises UsageError where there is none."""
    from buildsys.store.local import Store
    from buildsys.store.place import store_root

    root = store_root(os.environ)
    if root is None:
        raise UsageError("there is no store: QBUILD_CACHE is empty")
    try:
        return Store(root)
    except OSError as error:
        raise UsageError(f"the store {root} cannot be opened: {error.strerror}") from error


def keys_in_use(folder: str) -> set[str]:
    """The records that a build folder's journal names.

    Raises QbuildError for a journal that cannot be read: what it uses is not known then.
    """
    from buildsys.engine.folder import BuildFolder
    from buildsys.engine.journal import read_journal
    from buildsys.engine.storing import action_key

    try:
        done = read_journal(BuildFolder(folder).own("journal")).done
    except (QbuildError, OSError) as error:
        raise QbuildError(
            f"nothing was removed: what {folder} uses is not known ({error})",
            remedy="mend or remove that build folder",
        ) from error
    return {action_key(record["key"]) for record in done.values()}


def amount(count: int) -> str:
    """Bytes for people."""
    left = float(count)
    for unit in ("B", "KiB", "MiB"):
        if left < 1024:
            return f"{left:.0f} {unit}" if unit == "B" else f"{left:.1f} {unit}"
        left /= 1024
    return f"{left:.1f} GiB"
