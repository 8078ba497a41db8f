"""Converting: a whole new image of the disk that another image holds.

The new file is written under a temporary name beside its place, synced, and only
then given its name, durably. A conversion that fails removes what it wrote; one
that is killed leaves a file `.<name>.<random>.partial` and nothing under the name, and
the next one to the same name removes it (`partial`).
An NBD export or a block device has one place only and is overwritten there (`in_place`).
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import UUID

from replica.durable import FileSystem
from replica.errors import ImageError, SourceBusyError, StorageError, TargetExistsError
from replica.images.copying import copy_disk
from replica.images.device import claim
from replica.images.formats import create, in_place
from replica.images.image import Image, ImageWriter
from replica.images.partial import hold, temporary_for
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

    TargetExistsError if `target` is there and not `force`d, and always for a file of the source and for what is
    neither a plain file nor overwritten in place. SourceBusyError: the source did not stand still, or a block device
    is in use. ImageError for what cannot be read or what the format cannot hold. StorageError, StorageFullError.
    """
    fs = fs or FileSystem()
    with ExitStack() as claims:
        for file in source.files:
            if file.path.is_block_device():
                claims.enter_context(claim(fs, file.path))
        before = _stamps(fs, source)
        if in_place(target, format):
            _check_overwritten(source, target, force)
            with create(target, format, source.size_bytes, subformat=subformat, fs=fs) as writer:
                copy_disk(source, writer, progress)
                writer.sync()
            _check_still(fs, source, before)
            return
        _check_target(source, target, force)
        _write_new(fs, source, before, target, format, subformat, unique_id, force, progress)


def _write_new(
    fs: FileSystem,
    source: Image,
    before: list[tuple[int, int]],
    target: Path,
    format: str,
    subformat: str | None,
    unique_id: UUID | None,
    force: bool,
    progress: Progress,
) -> None:
    """Under a temporary name first."""
    temporary = temporary_for(target)
    with ExitStack() as stack:
        hold(fs, target.parent, stack, (target.name,))
        try:
            with _create(fs, temporary, target, format, source.size_bytes, subformat, unique_id) as writer:
                copy_disk(source, writer, progress)
                writer.sync()
            _check_still(fs, source, before)
            (fs.publish if force else fs.publish_new)(temporary, target)
        except BaseException:
            with suppress(StorageError):
                fs.unlink(temporary)
            raise


def _create(
    fs: FileSystem,
    temporary: Path,
    target: Path,
    format: str,
    size_bytes: int,
    subformat: str | None,
    unique_id: UUID | None,
) -> ImageWriter:
    """Errors name the target, and not the temporary file."""
    try:
        return create(temporary, format, size_bytes, subformat=subformat, unique_id=unique_id, fs=fs)
    except ImageError as error:
        raise ImageError(error.message.replace(str(temporary), str(target)), hint=error.hint) from error


def _stamps(fs: FileSystem, source: Image) -> list[tuple[int, int]]:
    """What a write to the source's files would change; devices have no stamps."""
    found = [fs.stat(file.path) for file in source.files]
    return [(info.st_size, info.st_mtime_ns) for info in found]


def _check_still(fs: FileSystem, source: Image, before: list[tuple[int, int]]) -> None:
    if _stamps(fs, source) != before:
        raise SourceBusyError(f"image {source.path} was written while it was converted", hint=_STAND)


def _is_read(source: Image, target: Path) -> bool:
    files = [file.path for file in source.files]
    return source.path == target or any(f.exists() and target.exists() and target.samefile(f) for f in files)


def _check_overwritten(source: Image, target: Path, force: bool) -> None:
    if _is_read(source, target):
        raise TargetExistsError(f"{target} is read for this conversion", hint="choose another one")
    if not force:
        raise TargetExistsError(f"all that {target} holds would be overwritten", hint="say that you mean it: --force")


def _check_target(source: Image, target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if _is_read(source, target):
        raise TargetExistsError(f"{target} is read for this conversion", hint="choose another name")
    if not target.is_file() or target.is_symlink():
        raise TargetExistsError(f"{target} already exists and is no plain file", hint="choose another name")
    if not force:
        raise TargetExistsError(f"{target} already exists", hint="choose another name, or replace it with --force")
