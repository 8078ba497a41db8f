"""A disk in memory: the system calls of `durable.FileSystem`, and a log of what they changed.

    disk = MemoryDisk()
    fs = FileSystem(disk)                   # the real FileSystem, loops and rules included, on top

It has what the engine asks a kernel for: sparse files, holes, hard and symbolic links, nameless files, renames, handles
that outlive their names, flock between handles, stamps of files. Its paths exist nowhere else, its file descriptors
are numbers no kernel gave out, so whatever goes round `FileSystem` fails.

Every change is told to `listener` as an operation; `crash_states` makes of them what a power cut may leave behind.
Before every call `fault` is asked: it may raise an OSError, or return how many bytes a read or write may do at most.

Files are immutable values (`Content`) that share pages, so that copies of a whole disk cost next to nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from replica.durable import SystemCalls

PAGE = 4096
ROOT = 1
FIRST_FD = 1 << 24
_ZEROS = bytes(PAGE)
_EPOCH_NS = 1_600_000_000 * 10**9 + 123_456_789
"""Every stamp of this disk lies in the past, and no two changes have the same: what stood still can be proven."""


class Content:
    """The bytes of a file, never changed in place. A page that was never written, or was punched, is a hole."""

    __slots__ = ("_hash", "pages", "size")

    def __init__(self, size: int = 0, pages: dict[int, bytes] | None = None) -> None:
        self.size = size
        self.pages = pages or {}
        self._hash = 0

    def __hash__(self) -> int:
        if not self._hash:
            self._hash = hash((self.size, frozenset(self.pages.items())))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.size == other.size and self.pages == other.pages

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        parts = []
        while length > 0:
            page, start = divmod(offset, PAGE)
            part = self.pages.get(page, _ZEROS)[start : start + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def written(self, offset: int, data: bytes) -> Content:
        pages, at, end = dict(self.pages), 0, offset + len(data)
        while offset < end:
            page, start = divmod(offset, PAGE)
            part = data[at : at + PAGE - start]
            old = pages.get(page, _ZEROS)
            pages[page] = old[:start] + part + old[start + len(part) :]
            at += len(part)
            offset += len(part)
        return Content(max(self.size, end), pages)

    def punched(self, offset: int, length: int) -> Content:
        """Zeros in the range, inside the size; whole pages become holes."""
        end = min(offset + length, self.size)
        pages = {}
        for page, data in self.pages.items():
            begin, stop = max(offset - page * PAGE, 0), min(end - page * PAGE, PAGE)
            if begin >= stop:
                pages[page] = data
            elif stop - begin < PAGE:
                pages[page] = data[:begin] + bytes(stop - begin) + data[stop:]
        return Content(self.size, pages)

    def resized(self, size: int) -> Content:
        if size >= self.size:
            return Content(size, self.pages)
        cut = self.punched(size, self.size - size)
        return Content(size, {page: data for page, data in cut.pages.items() if page * PAGE < size})


Tree = dict[int, Any]
"""A whole disk as a value: inode number -> Content | {name: number} | target of a symbolic link. Root is `ROOT`."""


class Op(NamedTuple):
    """One change. `kind`: write, size, hole, set (by a guest) of a file; new (what is no file); add, drop, rename of a
    name; sync; failed-sync; nothing."""

    kind: str
    inode: int
    args: tuple[Any, ...]
    site: str = ""


class _Open:
    """An open file description."""

    def __init__(self, inode: int, flags: int, path: str) -> None:
        self.inode, self.flags, self.path = inode, flags, path
        self.lock: int | None = None


class MemoryDisk(SystemCalls):
    """Thread-safe."""

    def __init__(self, tree: Tree | None = None, capacity: int = 1 << 40) -> None:
        self._nodes: Tree = {} if tree is None else dict(tree)
        self._nodes.setdefault(ROOT, {})
        for number, node in self._nodes.items():
            if isinstance(node, dict):
                self._nodes[number] = dict(node)
        self._next = max(self._nodes) + 1
        self._open_files: dict[int, _Open] = {}
        self._next_fd = FIRST_FD
        self._stamps: dict[int, int] = {}
        self._changes = 0
        self._capacity = capacity
        self._mutex = threading.Condition(threading.RLock())
        self.calls = 0
        self.listener: Callable[[Op], None] | None = None
        self.named_sites = False
        self.fault: Callable[[int, str, str], int | None] | None = None
        self.after_failed_sync: Callable[[int], Content | None] = lambda _inode: None

    # --- for tests ---

    def tree(self) -> Tree:
        """Everything as a process sees it now."""
        with self._mutex:
            return {n: dict(node) if isinstance(node, dict) else node for n, node in self._nodes.items()}

    def reserve(self, inode: int) -> None:
        """Give out no number up to this one."""
        self._next = max(self._next, inode + 1)

    def guest_write(self, path: Path, content: Content) -> None:
        """Set a file that is not the engine's, durably: nothing about it is ever lost."""
        with self._mutex:
            directory, name = self._parent(path)
            number = self._nodes[directory].get(name)
            if number is None:
                number = self._new(Content())
                self._nodes[directory][name] = number
                self._tell("add", directory, name, number)
                self._tell("sync", directory)
            self._nodes[number] = content
            self._touch(number)
            self._tell("set", number, content)

    # --- inside ---

    def _enter(self, call: str, where: object) -> int | None:
        self.calls += 1
        return self.fault(self.calls, call, str(where)) if self.fault is not None else None

    def _tell(self, kind: str, inode: int, *args: Any) -> None:
        if self.listener is not None:
            self.listener(Op(kind, inode, args, call_site() if self.named_sites else ""))

    def _new(self, node: Any) -> int:
        number, self._next = self._next, self._next + 1
        self._nodes[number] = node
        self._touch(number)
        if not isinstance(node, Content):
            self._tell("new", number, node if isinstance(node, str) else {})
        return number

    def _touch(self, number: int) -> None:
        self._changes += 1
        self._stamps[number] = self._changes

    def _walk(self, parts: Sequence[str], path: object) -> int:
        number = ROOT
        for part in parts:
            node = self._nodes[number]
            if isinstance(node, str):
                raise _error(errno.ELOOP, path)
            if not isinstance(node, dict):
                raise _error(errno.ENOTDIR, path)
            if part not in node:
                raise _error(errno.ENOENT, path)
            number = node[part]
        return number

    def _find(self, path: object, *, follow: bool = True) -> int:
        number = self._walk(_parts(path), path)
        node = self._nodes[number]
        if follow and isinstance(node, str):
            return self._find(Path(str(path)).parent / node)
        return number

    def _parent(self, path: object) -> tuple[int, str]:
        parts = _parts(path)
        number = self._walk(parts[:-1], path)
        if not isinstance(self._nodes[number], dict):
            raise _error(errno.ENOTDIR, path)
        return number, parts[-1]

    def _file(self, fd: int) -> tuple[_Open, Content]:
        if fd not in self._open_files:
            raise _error(errno.EBADF, fd)
        opened = self._open_files[fd]
        node = self._nodes[opened.inode]
        if not isinstance(node, Content):
            raise _error(errno.EISDIR, opened.path)
        return opened, node

    def _writable(self, fd: int) -> tuple[_Open, Content]:
        opened, content = self._file(fd)
        if opened.flags & os.O_ACCMODE == os.O_RDONLY:
            raise _error(errno.EBADF, opened.path)
        return opened, content

    # --- the system calls ---

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        with self._mutex:
            making = bool(flags & os.O_CREAT) or flags & os.O_TMPFILE == os.O_TMPFILE
            self._enter("create" if making else "open", path)
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                if not isinstance(self._nodes[self._find(path)], dict):
                    raise _error(errno.ENOTDIR, path)
                number = self._new(Content())
            else:
                directory, name = self._parent(path) if str(path) != "/" else (ROOT, "")
                present = not name or name in self._nodes[directory]
                if present and flags & os.O_CREAT and flags & os.O_EXCL:
                    raise _error(errno.EEXIST, path)
                if not present and not flags & os.O_CREAT:
                    raise _error(errno.ENOENT, path)
                if present:
                    number = self._find(path)
                else:
                    number = self._new(Content())
                    self._nodes[directory][name] = number
                    self._touch(directory)
                    self._tell("add", directory, name, number)
                if flags & os.O_DIRECTORY and not isinstance(self._nodes[number], dict):
                    raise _error(errno.ENOTDIR, path)
                if isinstance(self._nodes[number], dict) and flags & os.O_ACCMODE != os.O_RDONLY:
                    raise _error(errno.EISDIR, path)
            fd, self._next_fd = self._next_fd, self._next_fd + 1
            self._open_files[fd] = _Open(number, flags, str(path))
            return fd

    def close(self, fd: int) -> None:  # type: ignore[override]
        with self._mutex:
            if self._open_files.pop(fd, None) is None:
                raise _error(errno.EBADF, fd)
            self._mutex.notify_all()

    def fstat(self, fd: int) -> os.stat_result:  # type: ignore[override]
        with self._mutex:
            if fd not in self._open_files:
                raise _error(errno.EBADF, fd)
            return self._stat(self._open_files[fd].inode)

    def stat(self, path: Any) -> os.stat_result:  # type: ignore[override]
        with self._mutex:
            self._enter("stat", path)
            return self._stat(self._find(path))

    def lstat(self, path: Any) -> os.stat_result:  # type: ignore[override]
        with self._mutex:
            return self._stat(self._find(path, follow=False))

    def _stat(self, number: int) -> os.stat_result:
        node = self._nodes[number]
        kind = stat.S_IFREG if isinstance(node, Content) else stat.S_IFDIR if isinstance(node, dict) else stat.S_IFLNK
        size = node.size if isinstance(node, Content) else 0
        blocks = len(node.pages) * (PAGE // 512) if isinstance(node, Content) else 0
        when = _EPOCH_NS + self._stamps.get(number, 0) * 10**9
        floats = (when // 10**9, when // 10**9, when // 10**9)
        known = {"st_blocks": blocks, "st_mtime_ns": when, "st_ctime_ns": when}
        return os.stat_result((kind | 0o600, number, 7, 1, 0, 0, size, *floats), known)  # type: ignore[arg-type]

    def statvfs(self, path: Any) -> Any:  # type: ignore[override]
        with self._mutex:
            used = sum(len(node.pages) for node in self._nodes.values() if isinstance(node, Content))
            free = max(0, self._capacity // PAGE - used)
        return os.statvfs_result((PAGE, PAGE, self._capacity // PAGE, free, free, 1 << 20, 1 << 20, 1 << 20, 0, 255))

    def lseek(self, fd: int, position: int, whence: int) -> int:  # type: ignore[override]
        with self._mutex:
            _, content = self._file(fd)
            if whence == os.SEEK_END:
                return content.size + position
            if position >= content.size:
                raise _error(errno.ENXIO, fd)
            pages = sorted(p for p in content.pages if (p + 1) * PAGE > position)
            if whence == os.SEEK_DATA:
                if not pages or pages[0] * PAGE >= content.size:
                    raise _error(errno.ENXIO, fd)
                return max(position, pages[0] * PAGE)
            for page in pages:
                if page * PAGE > position:
                    break
                position = (page + 1) * PAGE
            return min(position, content.size)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:  # type: ignore[override]
        with self._mutex:
            opened, content = self._file(fd)
            limit = self._enter("read", opened.path)
            (buffer,) = buffers
            data = content.read(offset, len(buffer) if limit is None else min(limit, len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        with self._mutex:
            opened, content = self._writable(fd)
            limit = self._enter("write", opened.path)
            part = bytes(data[:limit])
            self._nodes[opened.inode] = content.written(offset, part)
            self._touch(opened.inode)
            self._tell("write", opened.inode, offset, part)
            return len(part)

    def ftruncate(self, fd: int, size: int) -> None:  # type: ignore[override]
        with self._mutex:
            opened, content = self._writable(fd)
            self._enter("truncate", opened.path)
            self._nodes[opened.inode] = content.resized(size)
            self._touch(opened.inode)
            self._tell("size", opened.inode, size)

    def punch(self, fd: int, offset: int, length: int) -> None:  # type: ignore[override]
        with self._mutex:
            opened, content = self._writable(fd)
            self._enter("punch", opened.path)
            self._nodes[opened.inode] = content.punched(offset, length)
            self._touch(opened.inode)
            self._tell("hole", opened.inode, offset, length)

    def fsync(self, fd: int) -> None:  # type: ignore[override]
        with self._mutex:
            if fd not in self._open_files:
                raise _error(errno.EBADF, fd)
            opened = self._open_files[fd]
            is_directory = isinstance(self._nodes[opened.inode], dict)
            try:
                self._enter("sync-directory" if is_directory else "sync", opened.path)
            except OSError:
                self._tell("failed-sync", opened.inode)
                reverted = self.after_failed_sync(opened.inode)
                if reverted is not None:
                    self._nodes[opened.inode] = reverted
                raise
            self._tell("sync", opened.inode)

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:  # type: ignore[override]
        """Nothing is cached here."""

    def start_writing(self, fd: int, offset: int, length: int) -> None:  # type: ignore[override]
        """When unsynced writes reach the disk, here the explorer decides."""

    def set_direct(self, fd: int, direct: bool) -> None:  # type: ignore[override]
        raise _error(errno.EINVAL, fd)

    def clone(self, source: int, target: int) -> None:  # type: ignore[override]
        raise _error(errno.EOPNOTSUPP, target)

    def flock(self, fd: int, operation: int) -> None:  # type: ignore[override]
        with self._mutex:
            opened = self._open_files[fd]
            self._enter("lock", opened.path)
            while any(
                other is not opened and other.inode == opened.inode and other.lock is not None
                and not (other.lock == fcntl.LOCK_SH and operation & fcntl.LOCK_SH)
                for other in self._open_files.values()
            ):  # fmt: skip
                if operation & fcntl.LOCK_NB:
                    raise BlockingIOError(errno.EWOULDBLOCK, "locked")
                self._mutex.wait()
            opened.lock = operation & ~fcntl.LOCK_NB

    def mkdir(self, path: Any, mode: int = 0o777) -> None:  # type: ignore[override]
        self._add("mkdir", path, lambda: self._new({}))

    def symlink(self, target: Any, path: Any) -> None:  # type: ignore[override]
        self._add("symlink", path, lambda: self._new(str(target)))

    def link(self, source: Any, path: Any) -> None:  # type: ignore[override]
        self._add("link", path, lambda: self._find(source))

    def _add(self, call: str, path: Any, make: Callable[[], int]) -> None:
        with self._mutex:
            self._enter(call, path)
            directory, name = self._parent(path)
            if name in self._nodes[directory]:
                raise _error(errno.EEXIST, path)
            number = make()
            self._nodes[directory][name] = number
            self._touch(directory)
            self._tell("add", directory, name, number)

    def rmdir(self, path: Any) -> None:  # type: ignore[override]
        with self._mutex:
            if self._nodes[self._find(path)]:
                raise _error(errno.ENOTEMPTY, path)
            self._drop("rmdir", path)

    def unlink(self, path: Any) -> None:  # type: ignore[override]
        with self._mutex:
            if isinstance(self._nodes[self._find(path, follow=False)], dict):
                raise _error(errno.EISDIR, path)
            self._drop("unlink", path)

    def _drop(self, call: str, path: Any) -> None:
        self._enter(call, path)
        directory, name = self._parent(path)
        del self._nodes[directory][name]
        self._touch(directory)
        self._tell("drop", directory, name)

    def rename(self, source: Any, target: Any) -> None:  # type: ignore[override]
        with self._mutex:
            self._enter("rename", target)
            from_directory, from_name = self._parent(source)
            to_directory, to_name = self._parent(target)
            number = self._find(source, follow=False)
            if from_directory != to_directory:
                raise _error(errno.EXDEV, target)  # not modelled, and never done by the engine
            names = self._nodes[to_directory]
            if isinstance(self._nodes.get(names.get(to_name)), dict):
                raise _error(errno.EISDIR, target)
            if names.get(to_name) == number:
                return
            del names[from_name]
            names[to_name] = number
            self._touch(to_directory)
            self._tell("rename", to_directory, from_name, to_name, number)

    def listdir(self, path: Any) -> list[str]:  # type: ignore[override]
        with self._mutex:
            self._enter("list", path)
            node = self._nodes[self._find(path)]
            if not isinstance(node, dict):
                raise _error(errno.ENOTDIR, path)
            return list(node)

    def readlink(self, path: Any) -> str:  # type: ignore[override]
        with self._mutex:
            node = self._nodes[self._find(path, follow=False)]
            if not isinstance(node, str):
                raise _error(errno.EINVAL, path)
            return node


def _parts(path: object) -> list[str]:
    return [part for part in str(path).split("/") if part]


def _error(number: int, path: object) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def call_site() -> str:
    """Who asked for this call: `store/commit.py:_rewrite < durable.py:publish`. Frames of the disk are left out."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/replica/" in name and not name.endswith("memory_disk.py"):
            short = name.rsplit("/replica/", 1)[1]
            found.append(f"{short}:{frame.f_code.co_name}")
            if short not in ("durable.py", "documents.py", "store/layout.py"):
                break
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(reversed(found))


def walk(tree: Tree, number: int = ROOT, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, node) of everything that has a name."""
    node = tree[number]
    yield path or "/", node
    if isinstance(node, dict):
        for name, child in sorted(node.items()):
            yield from walk(tree, child, f"{path}/{name}")
