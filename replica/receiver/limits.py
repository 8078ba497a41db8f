"""What a receiver asks of its process at the start: as many descriptors as it may have, and one heap for all threads.

glibc gives threads that allocate at the same time a heap ("arena") each, up to eight per core, and none of them gives
back what is free in its middle. Commits run in threads of their own and allocate pieces of 4 MiB, so each heap in time
keeps some of them, nearly empty (mallopt(3), M_ARENA_MAX; docs/PERFORMANCE.md has what it was).
"""

from __future__ import annotations

import ctypes
import logging
import resource
from contextlib import suppress
from typing import Final

log = logging.getLogger(__name__)

ARENAS: Final = 1
_M_ARENA_MAX: Final = -8
"""<malloc.h> of glibc."""


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: the default of 1024 is made for `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            log.debug("descriptors: %s instead of %d", hard if hard != resource.RLIM_INFINITY else "unlimited", soft)


def share_arenas() -> bool:
    """Let threads that start from now on share `ARENAS` heaps. False where the C library does not know that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt is not None and mallopt(_M_ARENA_MAX, ARENAS))
