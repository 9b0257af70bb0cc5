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
    from buildsys.store.remote import Remote

Say = Callable[[str], None]


def open_step_cache(
    folder: str, stamps: Stamps, say: Say, forced: Collection[str], url: str | None
) -> StepCache | None:
    """None where there is no store; url: of the shared cache.

    Raises UsageError for a URL that cannot be opened here or a key that is none.
    """
    root = store_root(os.environ)
    if root is None:
        if url is not None:
            raise UsageError("--cache needs the local store, and QBUILD_CACHE is empty")
        return None
    try:
        store = Store(root)
        make_remote = _shared(url, store, say) if url is not None else None
        return StepCache(store, folder, stamps, say, forced, make_remote)
    except OSError as error:
        say(f"warning: the store {root} cannot be used ({error.strerror}): building without it")
        return None


def _shared(url: str, store: Store, say: Say) -> Callable[[Say], Remote]:
    from buildsys.store.remote import Remote
    from buildsys.store.signing import key_file, read_key
    from buildsys.store.transport import check_url

    check_url(url)
    key = read_key(os.environ)
    if key is None:
        say(f"reading from --cache only, and unchecked: there is no {key_file(os.environ)}")
    return lambda warn: Remote(url, key, store, warn)
