"""Files under temporary names that a process which was killed has left in a user's directory.

Whoever writes such files holds a shared lock on the directory itself, so whoever gets it exclusively knows that
nobody is writing there. A file system that knows no locks on directories keeps what was left.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from replica.durable import FileSystem
from replica.errors import BusyError, StorageError

log = logging.getLogger(__name__)
RESTORED = re.compile(r"\.(files|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\.[0-9a-f]{8}\.partial")
"""What restores write to before they give names."""


def temporary_for(target: Path) -> Path:
    """A name beside `target` that `hold` knows again as left over from making it."""
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")


def hold(fs: FileSystem, directory: Path, stack: ExitStack, names: Iterable[str] = ()) -> None:
    """Take a lock on the directory, kept by `stack`; if nobody else has one, first remove what was left there.

    That are files of restores, and those of targets with these names.
    """
    of_names = [re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.partial") for name in names]
    with suppress(BusyError, StorageError), fs.lock_directory(directory):
        for name in fs.list_names(directory):
            if any(pattern.fullmatch(name) for pattern in (RESTORED, *of_names)):
                path = directory / name
                log.info("removing %s, which was left when its writer was cut", path)
                fs.remove_any(path)
    with suppress(StorageError):
        stack.enter_context(fs.lock_directory(directory, shared=True, wait=True))
