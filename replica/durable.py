"""The one door to durability: every write the store and the trackers make goes through here.

Only this module creates, renames, unlinks, fsyncs, locks and punches. It is a
class, `FileSystem`, and not a set of functions, so that one fault-injecting
double can stand in for it; the store and the trackers are handed one.

The rules it upholds:

- A file gets its final name only after its own fsync succeeded, and the name
  counts only after the directory's fsync (`publish`, `replace_bytes`).
- After a failed fsync nothing is retried on the same file: Linux reports the
  error once and may have dropped the pages. The caller writes anew under a
  new name, or stops.
- Every `OSError` becomes a `StorageError` that names the path;
  ENOSPC and EDQUOT become `StorageFullError`.

Handles (`File`) may be shared between threads for positioned reads and writes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from replica.errors import BusyError, StorageError, StorageFullError, TargetExistsError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_SYNC_FILE_RANGE_WRITE = 0x02
_FICLONE = 0x40049409
_COPY_BYTES = 1 << 20
_DIRECT_BYTES = 4096
"""Direct I/O needs places, lengths and memory that are multiples of the device's blocks; those of nearly all are."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def _checked(function: Callable[..., int], *arguments: int) -> None:
    """Call a function of libc that answers 0, again where a signal came in between; OSError otherwise."""
    number = errno.EINTR
    while number == errno.EINTR:
        if function(*arguments) == 0:
            return
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


class SystemCalls:
    """What the kernel is asked for here, call by call: the seam below every loop and every rule of this module.

    A disk that crashes, lies or fails (`tests/crash`) is a double of this class.
    """

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def stat(self, path: Path) -> os.stat_result:
        return os.stat(path)

    def lstat(self, path: Path) -> os.stat_result:
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def statvfs(self, path: Path) -> os.statvfs_result:
        return os.statvfs(path)

    def lseek(self, fd: int, offset: int, how: int) -> int:
        return os.lseek(fd, offset, how)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        _checked(_libc.fallocate, fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        os.posix_fadvise(fd, offset, length, advice)

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        _checked(_libc.sync_file_range, fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def clone(self, source: int, target: int) -> None:
        fcntl.ioctl(target, _FICLONE, source)

    def set_direct(self, fd: int, direct: bool) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)

    def flock(self, fd: int, how: int) -> None:
        fcntl.flock(fd, how)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def symlink(self, target: str, path: Path) -> None:
        os.symlink(target, path)

    def readlink(self, path: Path) -> str:
        return os.readlink(path)


KERNEL = SystemCalls()


@contextmanager
def _named(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what was being done to which path."""
    try:
        yield
    except OSError as error:
        kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"cannot {action} {path}: {error.strerror or error}") from error


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


class File:
    """An open file. Positioned I/O only; complete or an error, never short."""

    def __init__(self, fd: int, path: Path, calls: SystemCalls = KERNEL) -> None:
        self._fd = fd
        self._calls = calls
        self._from_device = self._direct = False
        self._device_fd = -1
        """For writing past the cache, if that was asked for and can be."""
        self._writes_direct = False
        self.path = path

    def fileno(self) -> int:
        return self._fd

    def stat(self) -> os.stat_result:
        with _named("stat", self.path):
            return self._calls.fstat(self._fd)

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2), for what only it answers: the end of a device (SEEK_END), data and holes. Raises OSError."""
        return self._calls.lseek(self._fd, offset, whence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._device_fd >= 0:
            fd, self._device_fd, self._writes_direct = self._device_fd, -1, False
            with suppress(OSError):  # what was written there, `sync` has told
                self._calls.close(fd)
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with _named("close", self.path):
                self._calls.close(fd)

    def size(self) -> int:
        """Of a block device, too."""
        with _named("stat", self.path):
            info = self._calls.fstat(self._fd)
            return self._calls.lseek(self._fd, 0, os.SEEK_END) if stat.S_ISBLK(info.st_mode) else info.st_size

    def has_name(self) -> bool:
        """Whether the file's path still names this very file; nobody else gets its inode while it is open."""
        with _named("stat", self.path):
            try:
                return os.path.samestat(self._calls.fstat(self._fd), self._calls.stat(self.path))
            except FileNotFoundError:
                return False

    def allocated_bytes(self) -> int:
        """Bytes the file occupies on its file system (holes do not count)."""
        with _named("stat", self.path):
            return self._calls.fstat(self._fd).st_blocks * 512

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
        view = memoryview(buffer).cast("B")
        with _named("read", self.path):
            return self._read_from_device(offset, view) if self._from_device else self._read_through_cache(offset, view)

    def read_each(self, offsets: Sequence[int], length: int, buffer: memoryview) -> int:
        """Fill `buffer` (bytes) with `length` from each offset, one behind the other; how many were read whole.

        Stops at the first that reaches behind the file's end.
        """
        with _named("read", self.path):
            for number, offset in enumerate(offsets):
                part = buffer[number * length : (number + 1) * length]
                count = self._calls.preadv(self._fd, [part], offset)
                if count != length and self._read_through_cache(offset, part) != length:
                    return number
        return len(offsets)

    def _read_through_cache(self, offset: int, view: memoryview) -> int:
        done = 0
        while done < len(view):
            count = self._calls.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read_from_device(self) -> None:
        """From now on `read_into` and `read` answer what the device has, and leave the kernel's cache as it is.

        Where a file system has no direct I/O, or not in such blocks, each range is dropped from the cache instead
        before it is read. What of a buffer lies behind the file's end may be overwritten. For a file that nobody reads
        yet.
        """
        self._from_device = self._direct = True
        try:
            self._calls.set_direct(self._fd, True)
        except OSError:
            self._direct = False

    def _read_from_device(self, offset: int, view: memoryview) -> int:
        if self._direct:
            try:
                done = self._read_direct(offset, view)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
                self._calls.set_direct(self._fd, False)
            if self._direct:  # else another thread found out meanwhile, and this may have come from the cache
                return done
        self.drop_cache(offset, len(view))
        return self._read_through_cache(offset, view)

    def _read_direct(self, offset: int, view: memoryview) -> int:
        """Whole blocks straight into the buffer where that is aligned, the rest through memory that is."""
        done = 0
        if offset % _DIRECT_BYTES == 0 and _address(view) % _DIRECT_BYTES == 0:
            whole = len(view) // _DIRECT_BYTES * _DIRECT_BYTES
            done = self._read_blocks(offset, view[:whole])
            if done < whole:
                return done
        if done < len(view):
            skipped = (offset + done) % _DIRECT_BYTES
            around = memoryview(mmap.mmap(-1, -(-(skipped + len(view) - done) // _DIRECT_BYTES) * _DIRECT_BYTES))
            count = self._read_blocks(offset + done - skipped, around) - skipped
            count = max(0, min(count, len(view) - done))
            view[done : done + count] = around[skipped : skipped + count]
            done += count
        return done

    def _read_blocks(self, offset: int, view: memoryview) -> int:
        """Read a buffer of whole blocks; fewer bytes only at the end of the file. OSError (EINVAL): no such blocks."""
        done = 0
        while done < len(view):
            count = self._calls.preadv(self._fd, [view[done:]], offset + done)
            done += count
            if count == 0:
                break
            if done % _DIRECT_BYTES:
                if offset + done < self._calls.fstat(self._fd).st_size:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                break
        return done

    def read_ranges(self, ranges: Sequence[tuple[int, int]], buffer: Buffer) -> None:
        """Fill `buffer` with the ranges (offset, length), one behind the other; zeros behind the file's end.

        All of them are asked for before the first is waited for, so that a device works on many at a time.
        """
        view, at = memoryview(buffer).cast("B"), 0
        if len(ranges) > 1:
            with suppress(OSError):
                for offset, length in ranges:
                    self._calls.fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        with _named("read", self.path):
            for offset, length in ranges:
                end, place = at + length, offset - at
                while at < end:
                    count = self._calls.preadv(self._fd, [view[at:end]], place + at)
                    if count == 0:
                        view[at:end] = bytes(end - at)
                        count = end - at
                    at += count

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, or fewer at the end of the file."""
        buffer = bytearray(length)
        count = self.read_into(offset, buffer)
        return bytes(buffer) if count == length else bytes(buffer[:count])

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        with _named("write", self.path):
            done = self._write_direct(offset, view) if self._writes_direct else 0
            while done < len(view):
                done += self._calls.pwrite(self._fd, view[done:], offset + done)

    def write_to_device(self) -> None:
        """From now on `write` hands whole blocks of aligned memory to the device past the kernel's cache, if it can.

        What is written is as durable as without: after a sync. For a file that has its name and that no other thread
        has yet.
        """
        with suppress(OSError):
            self._device_fd = self._calls.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            self._writes_direct = True

    def _write_direct(self, offset: int, view: memoryview) -> int:
        """Write what can be written so; how many bytes from the begin those are."""
        if offset % _DIRECT_BYTES or view.readonly or _address(view) % _DIRECT_BYTES:
            return 0
        done, whole = 0, len(view) // _DIRECT_BYTES * _DIRECT_BYTES
        try:
            while done < whole and done % _DIRECT_BYTES == 0:
                done += self._calls.pwrite(self._device_fd, view[done:whole], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._writes_direct = False
        return done

    def write_ranges(self, ranges: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Write `data` to the ranges (offset, length), one behind the other."""
        view, at = memoryview(data).cast("B"), 0
        for offset, length in ranges:
            self.write(offset, view[at : at + length])
            at += length

    def truncate(self, size_bytes: int) -> None:
        with _named("resize", self.path):
            self._calls.ftruncate(self._fd, size_bytes)

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros inside the file's size, as a hole where the file system can."""
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        with _named("punch a hole into", self.path):
            try:
                self._calls.punch(self._fd, offset, length)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        blank = bytes(min(length, 1 << 20))
        for start in range(offset, offset + length, len(blank)):
            self.write(start, memoryview(blank)[: min(len(blank), offset + length - start)])

    def data_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges (offset, length) in [start, stop) that may hold data; holes are left out.

        A file system that does not know answers one range: everything.
        """
        while start < stop:
            try:
                begin = self._calls.lseek(self._fd, start, os.SEEK_DATA)
                end = min(self._calls.lseek(self._fd, begin, os.SEEK_HOLE), stop)
            except OSError as error:
                if error.errno != errno.ENXIO:  # the file system does not know: all of it may be data
                    yield start, stop - start
                return
            if begin >= stop or end <= begin:
                return
            yield begin, end - begin
            start = end

    def sync(self) -> None:
        """fsync: content and size are on stable storage when this returns."""
        with _named("sync", self.path):
            self._calls.fsync(self._fd)

    def start_writing(self, offset: int, length: int) -> None:
        """Ask the kernel to begin writing the range back, so that the sync that follows has less to wait for.

        Promises nothing, and what fails here the sync says.
        """
        with suppress(OSError):
            self._calls.start_writing(self._fd, offset, length)

    def read_ahead(self, offset: int, length: int) -> None:
        """Ask the kernel to begin reading the range into its cache."""
        with suppress(OSError):
            self._calls.fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def clone_from(self, source: File) -> bool:
        """Become a copy of `source` that shares its blocks; False where the file system cannot do that.

        Whoever writes to either gets blocks of its own. `source` must not be written meanwhile for one to know what
        the copy holds.
        """
        try:
            self._calls.clone(source.fileno(), self._fd)
        except OSError:
            return False
        return True

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        """Ask the kernel to forget cached pages (only clean ones go), so that a read comes from the device."""
        with suppress(OSError):
            self._calls.fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


class Lock:
    """A kernel lock on a file (flock): gone with the process, whatever happens to it."""

    def __init__(self, fd: int, path: Path, calls: SystemCalls = KERNEL) -> None:
        self._fd = fd
        self._calls = calls
        self.path = path

    def release(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._calls.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class FileSystem:
    """The file system that `calls` leads to: the real one. Stateless and thread-safe."""

    _calls: SystemCalls = KERNEL

    def __init__(self, calls: SystemCalls = KERNEL) -> None:
        self._calls = calls

    def open(self, path: Path, *, write: bool = False) -> File:
        """Open an existing file. Never waits, should it be a named pipe."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
        with _named("open", path):
            return File(self._calls.open(path, flags), path, self._calls)

    def claim(self, path: Path, *, write: bool = False) -> File:
        """Open a block device exclusively (open(2): O_EXCL): EBUSY while it is mounted or otherwise claimed."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
        with _named("claim", path):
            return File(self._calls.open(path, flags), path, self._calls)

    def create(self, path: Path, *, private: bool = False) -> File:
        """Create a new file for reading and writing; it must not exist. `private`: mode 0600."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _named("create", path):
            return File(self._calls.open(path, flags, 0o600 if private else 0o640), path, self._calls)

    def create_anonymous(self, directory: Path) -> File:
        """A nameless scratch file that vanishes with its last handle, whatever happens."""
        with _named("create a scratch file in", directory):
            try:
                fd = self._calls.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
                return File(fd, directory, self._calls)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
            path = directory / f".scratch-{os.urandom(8).hex()}"
            fd = self._calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._calls.unlink(path)
            return File(fd, path, self._calls)

    def sync_directory(self, path: Path) -> None:
        """fsync a directory: the names in it are as durable as they are now."""
        with _named("sync", path):
            fd = self._calls.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._calls.fsync(fd)
            finally:
                self._calls.close(fd)

    def make_directory(self, path: Path, *, private: bool = False) -> None:
        """Create a directory and its parents where missing, each durable in its parent."""
        if self.is_directory(path):
            return
        self.make_directory(path.parent)
        with _named("create", path), suppress(FileExistsError):
            self._calls.mkdir(path, 0o700 if private else 0o750)
        self.sync_directory(path.parent)

    def settle_names(self, path: Path, levels: int) -> None:
        """Make the name of `path` durable, and those of the directories above it, so many in all.

        For what is seen and may have been made by a process that was killed before it synced the name.
        """
        for directory in list(path.parents)[:levels]:
            self.sync_directory(directory)

    def publish(self, temporary: Path, final: Path) -> None:
        """Give a file that was written *and synced* its final name, durably. Replaces what was there."""
        with _named("rename to", final):
            self._calls.rename(temporary, final)
        self.sync_directory(final.parent)
        if temporary.parent != final.parent:
            self.sync_directory(temporary.parent)

    def publish_new(self, temporary: Path, final: Path) -> None:
        """Like `publish`, but TargetExistsError if something has that name by now."""
        with _named("rename to", final):
            try:
                self._calls.link(temporary, final)
            except FileExistsError:
                raise TargetExistsError(
                    f"{final} already exists", hint="choose another place or move it away"
                ) from None
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
                self._calls.rename(temporary, final)  # a file system without hard links; nobody else writes there
            else:
                self._calls.unlink(temporary)
        self.sync_directory(final.parent)

    def replace_bytes(self, path: Path, data: bytes, *, private: bool = False) -> None:
        """Atomic replace: after a crash the file holds the old bytes or the new ones, all of them."""
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        try:
            with self.create(temporary, private=private) as file:
                file.write(0, data)
                file.sync()
            self.publish(temporary, path)
        except StorageError:
            with suppress(OSError):
                self._calls.unlink(temporary)
            raise

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file to a new name, content durable; the name is the caller's to make durable."""
        with self.open(source) as old, self.create(target) as new:
            size = old.size()
            for offset in range(0, size, _COPY_BYTES):
                new.write(offset, old.read(offset, min(_COPY_BYTES, size - offset)))
            new.sync()

    def clear_temporaries(self, directory: Path) -> None:
        """Remove what a `replace_bytes` that was cut has left. Only while nobody else replaces files there."""
        for name in self.list_names(directory):
            if name.startswith(".") and name.endswith(".tmp"):
                self.unlink(directory / name)

    def read_bytes(self, path: Path, limit: int) -> bytes:
        """The whole file, which may have at most `limit` bytes (StorageError otherwise)."""
        with self.open(path) as file:
            size = file.size()
            if size > limit:
                raise StorageError(f"{path} has {size} bytes, more than the {limit} it may have")
            return file.read(0, size)

    def exists(self, path: Path) -> bool:
        with _named("stat", path):
            try:
                self._calls.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def stat(self, path: Path) -> os.stat_result:
        """What the kernel says of a file; StorageError if it is not there."""
        with _named("stat", path):
            return self._calls.stat(path)

    def is_directory(self, path: Path) -> bool:
        """Whether there is a directory, or a link to one."""
        with _named("stat", path):
            try:
                return stat.S_ISDIR(self._calls.stat(path).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

    def is_taken(self, path: Path) -> bool:
        """Whether anything has that name, be it a link that leads nowhere."""
        with _named("stat", path):
            try:
                self._calls.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def list_names(self, path: Path) -> list[str]:
        """Sorted names in a directory; an absent directory is an empty one."""
        with _named("list", path):
            try:
                return sorted(self._calls.listdir(path))
            except FileNotFoundError:
                return []

    def unlink(self, path: Path) -> None:
        """Remove a file if it is there, durably."""
        with _named("remove", path):
            try:
                self._calls.unlink(path)
            except FileNotFoundError:
                return
        self.sync_directory(path.parent)

    def remove_empty(self, path: Path) -> None:
        """Remove a directory, durably; one that something is in stays."""
        with _named("remove", path):
            try:
                self._calls.rmdir(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return
        self.sync_directory(path.parent)

    def remove_any(self, path: Path) -> None:
        """Remove what has that name, durably: a file, a link, or a directory with all that is in it."""
        with _named("stat", path):
            directory = stat.S_ISDIR(self._calls.lstat(path).st_mode)
        if directory:
            self.remove_tree(path)
        else:
            self.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory with the plain files and directories in it, durably."""
        with _named("remove", path):
            for name in self.list_names(path):
                child = path / name
                if stat.S_ISDIR(self._calls.lstat(child).st_mode):
                    self.remove_tree(child)
                else:
                    self._calls.unlink(child)
            with suppress(FileNotFoundError):
                self._calls.rmdir(path)
        self.sync_directory(path.parent)

    def set_links(self, directory: Path, links: dict[str, str]) -> None:
        """Make the symbolic links in `directory` exactly these (name -> target).

        Only links are ever removed: a name that a real file has is left to that file.
        """
        with _named("link in", directory):
            present = {
                name: self._calls.readlink(directory / name)
                for name in self._calls.listdir(directory)
                if stat.S_ISLNK(self._calls.lstat(directory / name).st_mode)
            }
            if present == links:
                return
            for name in present:
                if links.get(name) != present[name]:
                    self._calls.unlink(directory / name)
            for name, target in links.items():
                if present.get(name) != target:
                    with suppress(FileExistsError):
                        self._calls.symlink(target, directory / name)
        self.sync_directory(directory)

    def free_bytes(self, path: Path) -> int:
        with _named("stat", path):
            info = self._calls.statvfs(path)
        return info.f_bavail * info.f_frsize

    def total_bytes(self, path: Path) -> int:
        """The size of the file system that `path` lies on."""
        with _named("stat", path):
            info = self._calls.statvfs(path)
        return info.f_blocks * info.f_frsize

    def lock(self, path: Path, *, shared: bool = False, wait: bool = False, busy: str = "") -> Lock:
        """Take a kernel lock on `path` (made if missing). BusyError with message `busy` if taken and not `wait`."""
        return self._lock(path, os.O_RDWR | os.O_CREAT, shared, wait, busy)

    def lock_directory(self, path: Path, *, shared: bool = False, wait: bool = False, busy: str = "") -> Lock:
        """Like `lock`, on a directory that is there: nothing is made in it."""
        return self._lock(path, os.O_RDONLY | os.O_DIRECTORY, shared, wait, busy)

    def _lock(self, path: Path, flags: int, shared: bool, wait: bool, busy: str) -> Lock:
        with _named("lock", path):
            fd = self._calls.open(path, flags | os.O_CLOEXEC, 0o640)
            try:
                self._calls.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                self._calls.close(fd)
                raise BusyError(busy or f"{path} is locked by another process") from None
            except BaseException:
                self._calls.close(fd)
                raise
        return Lock(fd, path, self._calls)
