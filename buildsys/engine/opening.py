"""Opens the store and the shared cache for a build, as the environment and the command line say."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from buildsys.engine.storing import StepCache
from buildsys.errors import UsageError
from buildsys.store.local import Store
from buildsys.store.place import store_root

if TYPE_CHECKING:
    from buildsys.engine.stamps import Stamps
    from buildsys.engine.trace import Trace
    from buildsys.store.remote import Remote

Say = Callable[[str], None]


def open_step_cache(
    folder: str,
    stamps: Stamps,
    say: Say,
    forced: Collection[str],
    url: str | None,
    trace: Trace | None = None,
) -> StepCache | None:
    """None where there is no store; url: of the shared cache; trace: where what it does is noted.

    Raises UsageError for a URL that cannot be opened here or a key that is none.
    """
    root = store_root(os.environ)
    if root is None:
        if url is not None:
            raise UsageError("--cache needs the local store, and QBUILD_CACHE is empty")
        return None
    try:
        store = Store(root) if trace is None else _traced_store(root, trace)
        make_remote = _shared(url, store, say, trace) if url is not None else None
        return StepCache(store, folder, stamps, say, forced, make_remote)
    except OSError as error:
        say(f"warning: the store {root} cannot be used ({error.strerror}): building without it")
        return None


def _traced_store(root: str, trace: Trace) -> Store:
    from buildsys.engine.traced import TracedStore

    return TracedStore(root, trace)


def _shared(url: str, store: Store, say: Say, trace: Trace | None) -> Callable[[Say], Remote]:
    from buildsys.store.remote import Remote
    from buildsys.store.signing import key_file, read_key
    from buildsys.store.transport import check_url

    check_url(url)
    key = read_key(os.environ)
    if key is None:
        say(f"reading from --cache only, and unchecked: there is no {key_file(os.environ)}")
    if trace is not None:
        from buildsys.engine.traced import TracedRemote

        return lambda warn: TracedRemote(url, key, store, warn, trace)
    return lambda warn: Remote(url, key, store, warn)
