"""Converting: a whole new image of the disk that another image holds.

The new file is written under a temporary name beside its place, synced, and only
then given its name, durably. A conversion that fails removes what it wrote; one
that is killed leaves a file `.<name>.<random>.partial`, and nothing under the name.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from replica.durable import FileSystem
from replica.errors import ImageError, SourceBusyError, StorageError, TargetExistsError
from replica.images.copying import copy_disk
from replica.images.formats import create
from replica.images.image import Image
from replica.progress import Progress, silent

_STAND = "convert it while nothing writes to it: with the machine off, or from a snapshot"


def convert(
    source: Image,
    target: Path,
    format: str,
    *,
    subformat: str | None = None,
    unique_id: UUID | None = None,
    force: bool = False,
    fs: FileSystem | None = None,
    progress: Progress = silent,
) -> None:
    """Write the disk of an open image, its parents' content included, as one new image; durable when this returns.

    TargetExistsError if `target` is there and not `force`d, and always for a file of the source and for what is no
    plain file. SourceBusyError: the source did not stand still. ImageError for what cannot be read or what the
    format cannot hold. StorageError, StorageFullError.
    """
    fs = fs or FileSystem()
    _check_target(source, target, force)
    before = _stamps(fs, source)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")
    try:
        try:
            writer = create(temporary, format, source.size_bytes, subformat=subformat, unique_id=unique_id, fs=fs)
        except ImageError as error:
            raise ImageError(error.message.replace(str(temporary), str(target)), hint=error.hint) from error
        with writer:
            copy_disk(source, writer, progress)
            writer.sync()
        if _stamps(fs, source) != before:
            raise SourceBusyError(f"image {source.path} was written while it was converted", hint=_STAND)
        (fs.publish if force else fs.publish_new)(temporary, target)
    except BaseException:
        with suppress(StorageError):
            fs.unlink(temporary)
        raise


def _stamps(fs: FileSystem, source: Image) -> list[tuple[int, int]]:
    """What a write to the source's files would change; devices have no stamps."""
    found = [fs.stat(file.path) for file in source.files]
    return [(info.st_size, info.st_mtime_ns) for info in found]


def _check_target(source: Image, target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if any(file.path.exists() and target.exists() and target.samefile(file.path) for file in source.files):
        raise TargetExistsError(f"{target} is read for this conversion", hint="choose another name")
    if not target.is_file() or target.is_symlink():
        raise TargetExistsError(f"{target} already exists and is no plain file", hint="choose another name")
    if not force:
        raise TargetExistsError(f"{target} already exists", hint="choose another name, or replace it with --force")
