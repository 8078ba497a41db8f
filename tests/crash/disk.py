"""A disk that can lose power: a double of the kernel below `replica.durable`, in memory.

What survives a power cut, and what may be lost (the permitted faults):

- The content and size of a file are durable as they were at its last successful fsync. Each later write, resize or
  hole is kept, lost or torn by itself, in any order: a later one may be there where an earlier one is not. Torn means
  that of one write only a first or last part of it is there, cut at a multiple of 512 B or of 4 KiB; or, where the
  file had no blocks yet, that it got them and there are zeros instead of the data.
- The names in a directory are durable as they were at its last successful fsync. Each later creation, removal and
  rename is kept or lost by itself, in any order; a rename is atomic: the old name or the new one, never neither.
- An fsync of a file says nothing about its name, one of a directory nothing about the content of the files in it.
- A failed fsync loses, at the next power cut or when the cache is dropped, what it should have made durable; a later
  successful fsync of the same file says nothing about that (Linux marks the pages clean).

Not modelled: damage to what was durable (tests/damage has that), and bytes written to the wrong place.

Every change is an entry of a log, so that what the disk was at any moment can be made again by replaying it, with
one barrier left out if one likes. Paths below `ROOT` are in memory; all others are the real file system's, so that
the images of a source may lie there. Thread-safe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from replica.durable import SystemCalls

ROOT = "/power"
PAGE = 4096
_FIRST_FD = 1 << 24
_ZEROS = bytes(PAGE)
_OWN = ("durable.py", "disk.py", "documents.py", "contextlib.py")


class Content:
    """The bytes of a file: pages that are not zero, and the size. Shared by convention: copied before a change."""

    __slots__ = ("_hash", "pages", "size")

    def __init__(self, pages: dict[int, bytes] | None = None, size: int = 0) -> None:
        self.pages, self.size = {} if pages is None else pages, size
        self._hash: int | None = None

    def copy(self) -> Content:
        return Content(dict(self.pages), self.size)

    def read(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        parts = []
        while offset < stop:
            page, start = divmod(offset, PAGE)
            take = min(PAGE - start, stop - offset)
            parts.append(self.pages.get(page, _ZEROS)[start : start + take])
            offset += take
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            page, start = divmod(offset + done, PAGE)
            take = min(PAGE - start, len(data) - done)
            old = self.pages.get(page, _ZEROS)
            self.pages[page] = old[:start] + data[done : done + take] + old[start + take :]
            done += take
        self.size = max(self.size, offset + len(data))

    def truncate(self, size: int) -> None:
        if size < self.size:
            edge, start = divmod(size, PAGE)
            for page in [p for p in self.pages if p > edge or (p == edge and not start)]:
                del self.pages[page]
            if edge in self.pages:
                self.pages[edge] = self.pages[edge][:start].ljust(PAGE, b"\0")
        self.size = size

    def punch(self, offset: int, length: int) -> None:
        stop = min(offset + length, self.size)
        for page in [p for p in self.pages if p * PAGE < stop and (p + 1) * PAGE > offset]:
            low, high = max(offset - page * PAGE, 0), min(stop - page * PAGE, PAGE)
            if low == 0 and high == PAGE:
                del self.pages[page]
            else:
                old = self.pages[page]
                self.pages[page] = old[:low] + bytes(high - low) + old[high:]

    def digest(self) -> int:
        """A hash of content and size; of a content that nobody changes any more."""
        if self._hash is None:
            state = xxhash.xxh3_64(self.size.to_bytes(8, "little"))
            for page in sorted(self.pages):
                if self.pages[page] != _ZEROS:
                    state.update(page.to_bytes(8, "little") + self.pages[page])
            self._hash = state.intdigest()
        return self._hash


class Op(NamedTuple):
    """One change, as it is logged. `label`: who asked for it, by call site."""

    kind: str
    ino: int
    args: tuple[Any, ...] = ()
    label: str = ""


@dataclass
class Inode:
    """A file, directory or symbolic link. `pending`: what is not durable yet, in order."""

    kind: str
    mode: int
    content: Content = field(default_factory=Content)
    durable: Content = field(default_factory=Content)
    entries: dict[str, int] = field(default_factory=dict)
    durable_entries: dict[str, int] = field(default_factory=dict)
    target: str = ""
    pending: list[Op] = field(default_factory=list)
    dropped: bool = False
    """A failed fsync has taken something out of `pending` that is not durable."""

    def copy(self) -> Inode:
        return Inode(
            self.kind,
            self.mode,
            self.content,
            self.durable,
            dict(self.entries),
            dict(self.durable_entries),
            self.target,
            list(self.pending),
            self.dropped,
        )


def apply_data(content: Content, op: Op) -> None:
    if op.kind == "write":
        content.write(*op.args)
    elif op.kind == "truncate":
        content.truncate(*op.args)
    else:
        content.punch(*op.args)


def apply_name(entries: dict[str, int], op: Op) -> None:
    if op.kind == "link":
        entries[op.args[0]] = op.args[1]
    elif op.kind == "unlink":
        entries.pop(op.args[0], None)
    else:
        source, target, ino = op.args
        if entries.get(source) == ino:
            del entries[source]
        entries[target] = ino


class Disk:
    """Inodes and what of them is durable. Changed by `apply` only."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {1: Inode("dir", 0o755)}

    def copy(self) -> Disk:
        other = Disk()
        other.inodes = {ino: inode.copy() for ino, inode in self.inodes.items()}
        return other

    def apply(self, op: Op) -> None:
        if op.kind == "make":
            kind, mode, target = op.args
            self.inodes[op.ino] = Inode(kind, mode, target=target)
            return
        inode = self.inodes[op.ino]
        if op.kind in ("write", "truncate", "punch"):
            content = inode.content = inode.content.copy()
            apply_data(content, op)
            inode.pending.append(op)
        elif op.kind in ("link", "unlink", "rename"):
            apply_name(inode.entries, op)
            inode.pending.append(op)
        elif op.kind == "fsync":
            self._sync(inode)
        elif op.kind == "failed":
            inode.dropped = inode.dropped or bool(inode.pending)
            inode.pending = []
        elif op.kind == "evict" and inode.dropped and inode.kind == "file":
            inode.content = self._replayed(inode)
        else:
            assert op.kind in ("evict", "note"), op

    @staticmethod
    def _replayed(inode: Inode) -> Content:
        content = inode.durable.copy()
        for op in inode.pending:
            apply_data(content, op)
        return content

    def _sync(self, inode: Inode) -> None:
        if inode.kind == "dir":
            if inode.dropped:
                for op in inode.pending:
                    apply_name(inode.durable_entries, op)
            else:
                inode.durable_entries = dict(inode.entries)
        else:
            inode.durable = self._replayed(inode) if inode.dropped else inode.content
        inode.pending = []

    # --- what a power cut may leave ---

    def after(self, kept: Callable[[Op], Op | None]) -> Disk:
        """The disk after a power cut in which of every pending change remained what `kept` makes of it."""
        other = Disk()
        other.inodes = {}
        for ino, inode in self.inodes.items():
            content, entries = inode.durable, inode.durable_entries
            if inode.pending:
                content, entries = content.copy(), dict(entries)
                for op in inode.pending:
                    left = kept(op)
                    if left is not None:
                        (apply_name if inode.kind == "dir" else apply_data)(
                            entries if inode.kind == "dir" else content,  # type: ignore[arg-type]
                            left,
                        )
            else:
                entries = dict(entries)
            other.inodes[ino] = Inode(inode.kind, inode.mode, content, content, entries, dict(entries), inode.target)
        other._forget_unreachable()
        return other

    def live(self) -> Disk:
        """The disk as it is, for a process that was killed while the power stayed on: nothing is lost."""
        return self.after(lambda op: op)

    def _forget_unreachable(self) -> None:
        seen: set[int] = set()
        todo = [1]
        while todo:
            ino = todo.pop()
            if ino not in seen and ino in self.inodes:
                seen.add(ino)
                todo += self.inodes[ino].entries.values()
        self.inodes = {ino: inode for ino, inode in self.inodes.items() if ino in seen}

    def pending(self, below: int | None = None) -> list[Op]:
        """Changes that are not durable, of inodes that have or may have a name, in the order of the inodes."""
        reachable: set[int] = set()
        todo = [1 if below is None else below]
        while todo:
            ino = todo.pop()
            inode = self.inodes.get(ino)
            if ino in reachable or inode is None:
                continue
            reachable.add(ino)
            todo += [*inode.entries.values(), *inode.durable_entries.values()]
            todo += [op.args[-1] for op in inode.pending if inode.kind == "dir" and op.kind != "unlink"]
        return [op for ino in sorted(reachable) for op in self.inodes[ino].pending]

    def lookup(self, path: str) -> int | None:
        ino: int | None = 1
        for part in path.removeprefix(ROOT).split("/"):
            if part and ino is not None:
                ino = self.inodes[ino].entries.get(part) if ino in self.inodes else None
        return ino

    def files(self, path: str = ROOT) -> Iterator[tuple[str, Inode]]:
        """Everything below a directory, by path."""
        ino = self.lookup(path)
        if ino is None:
            return
        for name, child in sorted(self.inodes[ino].entries.items()):
            where = f"{path}/{name}"
            if child not in self.inodes:
                continue  # a name that was kept of a file that was never made durable: an empty file
            yield where, self.inodes[child]
            if self.inodes[child].kind == "dir":
                yield from self.files(where)

    def digest(self, path: str = ROOT) -> int:
        state = xxhash.xxh3_64()
        for where, inode in self.files(path):
            state.update(f"{where}\0{inode.kind}\0{inode.target}\0".encode())
            if inode.kind == "file":
                state.update(inode.content.digest().to_bytes(8, "little"))
        return state.intdigest()


def torn(op: Op, durable: Content) -> Iterator[Op]:
    """What a power cut may leave of one write, apart from all and nothing of it. `durable`: what was there before."""
    if op.kind != "write":
        return
    offset, data = op.args
    for unit in (512, 4096):
        first = unit - offset % unit
        last = (offset + len(data)) // unit * unit - offset
        if first < len(data):
            yield op._replace(args=(offset, data[:first]))
            if unit == 512:
                yield op._replace(args=(offset + first, data[first:]))
        if first < last < len(data):
            yield op._replace(args=(offset, data[:last]))
    fresh = not any(page in durable.pages for page in range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1))
    if fresh and any(data):
        yield op._replace(args=(offset, bytes(len(data))))


def crash_states(disk: Disk, pending: Sequence[Op], chance: random.Random, limit: int) -> Iterator[Disk]:
    """What a power cut now may leave. All of it where that is at most about `limit` states, else a choice.

    The choice: everything lost, everything kept, each change alone lost or alone kept, every prefix, and random
    subsets; and each write torn in every way, beside all others kept and beside all others lost.
    """
    count = len(pending)
    place = {id(op): n for n, op in enumerate(pending)}

    def choose(mask: int, instead: dict[int, Op] | None = None) -> Disk:
        def kept(op: Op) -> Op | None:
            n = place.get(id(op))
            if n is None:
                return op  # of another site, whose power stayed on
            if instead is not None and n in instead:
                return instead[n]
            return op if mask >> n & 1 else None

        return disk.after(kept)

    everything = (1 << count) - 1
    if 1 << count <= limit:
        masks: Iterable[int] = range(1 << count)
    else:
        chosen = {0, everything}
        chosen |= {1 << n for n in range(count)} | {everything ^ 1 << n for n in range(count)}
        chosen |= {(1 << n) - 1 for n in range(count)}
        chosen |= {chance.getrandbits(count) for _ in range(limit // 4)}
        masks = sorted(chosen)
    for mask in masks:
        yield choose(mask)
    for n, op in enumerate(pending):
        for part in torn(op, disk.inodes[op.ino].durable):
            yield choose(everything, {n: part})
            yield choose(0, {n: part})


class PowerCut(BaseException):
    """No error: nothing of the program goes on."""


Fault = Callable[[str, str, int], None]
"""Called before every system call with its name, the path and the number of the call; may raise OSError."""


class Kernel(SystemCalls):
    """System calls on a `Disk`. `log` has every change in order; `notes` places in it with a meaning."""

    def __init__(
        self, disk: Disk | None = None, *, fault: Fault | None = None, free_bytes: int = 1 << 40, labels: bool = True
    ) -> None:
        self.disk = disk or Disk()
        self.log: list[Op] = []
        self.fault = fault
        self._label = caller if labels else _nobody
        self.free_bytes = free_bytes
        self.calls = 0
        self._changed = threading.Condition(threading.RLock())
        self._fds: dict[int, tuple[int, int, str]] = {}
        self._next_fd = _FIRST_FD
        self._next_ino = max(self.disk.inodes) + 1
        self._locks: dict[int, dict[int, int]] = {}

    # --- bookkeeping ---

    def _do(self, op: Op) -> None:
        self.disk.apply(op)
        self.log.append(op)

    def _enter(self, name: str, path: str) -> None:
        self.calls += 1
        if self.fault is not None:
            self.fault(name, path, self.calls)

    def _find(self, path: str, *, follow: bool = True) -> int:
        ino = 1
        for part in path.removeprefix(ROOT).split("/"):
            if not part:
                continue
            inode = self.disk.inodes.get(ino)
            if inode is None or inode.kind != "dir":
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            if part not in inode.entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            ino = inode.entries[part]
            if ino not in self.disk.inodes:
                self.disk.inodes[ino] = Inode("file", 0o640)
        inode = self.disk.inodes[ino]
        if inode.kind == "link" and follow:
            return self._find(f"{path.rpartition('/')[0]}/{inode.target}")
        return ino

    def _parent(self, path: str) -> tuple[int, str]:
        directory, _, name = path.rpartition("/")
        ino = self._find(directory)
        if self.disk.inodes[ino].kind != "dir":
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return ino, name

    def _make(self, parent: int, name: str, kind: str, mode: int, target: str = "") -> int:
        ino = self._next_ino
        self._next_ino += 1
        self._do(Op("make", ino, (kind, mode, target)))
        if name:
            self._do(Op("link", parent, (name, ino)))
        return ino

    def _inode(self, fd: int) -> tuple[int, Inode, str]:
        if fd not in self._fds:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        ino, _, path = self._fds[fd]
        return ino, self.disk.inodes[ino], path

    def _info(self, ino: int) -> os.stat_result:
        inode = self.disk.inodes[ino]
        kinds = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "link": stat.S_IFLNK}
        times = (0, 0, 0)
        return os.stat_result(
            (kinds[inode.kind] | inode.mode, ino, 7, 1, 0, 0, inode.content.size, *times),
            {"st_blocks": len(inode.content.pages) * (PAGE // 512)},
        )

    @staticmethod
    def _real(path: object) -> bool:
        text = os.fspath(path)  # type: ignore[call-overload]
        return not (text == ROOT or text.startswith(ROOT + "/"))

    # --- the calls ---

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if self._real(path):
            return os.open(path, flags, mode)
        text = os.fspath(path)
        with self._changed:
            self._enter("open", text)
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                self._find(text)
                ino = self._make(0, "", "file", mode)
            else:
                try:
                    ino = self._find(text)
                    if flags & os.O_CREAT and flags & os.O_EXCL:
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), text)
                    if flags & os.O_DIRECTORY and self.disk.inodes[ino].kind != "dir":
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), text)
                except FileNotFoundError:
                    if not flags & os.O_CREAT:
                        raise
                    self._enter("create", text)
                    parent, name = self._parent(text)
                    ino = self._make(parent, name, "file", mode)
            fd = self._next_fd
            self._next_fd += 1
            self._fds[fd] = (ino, flags, text)
            return fd

    def close(self, fd: int) -> None:
        if fd < _FIRST_FD:
            return os.close(fd)
        with self._changed:
            ino, _, _ = self._inode(fd)
            del self._fds[fd]
            if self._locks.get(ino, {}).pop(fd, None) is not None:
                self._changed.notify_all()
        return None

    def stat(self, path: Any) -> os.stat_result:
        if self._real(path):
            return os.stat(path)
        with self._changed:
            self._enter("stat", os.fspath(path))
            return self._info(self._find(os.fspath(path)))

    def lstat(self, path: Any) -> os.stat_result:
        if self._real(path):
            return os.lstat(path)
        with self._changed:
            return self._info(self._find(os.fspath(path), follow=False))

    def fstat(self, fd: int) -> os.stat_result:
        if fd < _FIRST_FD:
            return os.fstat(fd)
        with self._changed:
            return self._info(self._inode(fd)[0])

    def statvfs(self, path: Any) -> Any:
        if self._real(path):
            return os.statvfs(path)
        with self._changed:
            self._enter("statvfs", os.fspath(path))
            blocks = self.free_bytes // PAGE
            return os.statvfs_result((PAGE, PAGE, 1 << 28, blocks, blocks, 0, 0, 0, 0, 255))

    def lseek(self, fd: int, offset: int, how: int) -> int:
        if fd < _FIRST_FD:
            return os.lseek(fd, offset, how)
        with self._changed:
            _, inode, _ = self._inode(fd)
            size, pages = inode.content.size, inode.content.pages
            if offset >= size:
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            page = offset // PAGE
            if how == os.SEEK_DATA:
                found = [p for p in pages if p >= page and p * PAGE < size]
                if not found:
                    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
                return max(offset, min(found) * PAGE)
            while page in pages:
                page += 1
            return min(size, max(offset, page * PAGE))

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        if fd < _FIRST_FD:
            return os.preadv(fd, buffers, offset)
        with self._changed:
            _, inode, path = self._inode(fd)
            self._enter("read", path)
            done = 0
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                data = inode.content.read(offset + done, len(view))
                view[: len(data)] = data
                done += len(data)
            return done

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        if fd < _FIRST_FD:
            return os.pwrite(fd, data, offset)
        with self._changed:
            ino, _, path = self._inode(fd)
            self._enter("write", path)
            self._do(Op("write", ino, (offset, bytes(data))))
            return len(data)

    def ftruncate(self, fd: int, length: int) -> None:
        if fd < _FIRST_FD:
            return os.ftruncate(fd, length)
        with self._changed:
            ino, _, path = self._inode(fd)
            self._enter("write", path)
            return self._do(Op("truncate", ino, (length,)))

    def punch(self, fd: int, offset: int, length: int) -> None:
        if fd < _FIRST_FD:
            return SystemCalls().punch(fd, offset, length)
        with self._changed:
            ino, _, path = self._inode(fd)
            self._enter("write", path)
            return self._do(Op("punch", ino, (offset, length)))

    def fsync(self, fd: int) -> None:
        if fd < _FIRST_FD:
            return os.fsync(fd)
        with self._changed:
            ino, _, path = self._inode(fd)
            try:
                self._enter("fsync", path)
            except OSError:
                self._do(Op("failed", ino))
                raise
            return self._do(Op("fsync", ino, (), self._label()))

    def fadvise(self, fd: int, *arguments: Any) -> None:
        if fd < _FIRST_FD:
            return os.posix_fadvise(fd, *arguments)
        with self._changed:
            return self._do(Op("evict", self._inode(fd)[0]))

    def flock(self, fd: int, how: int) -> None:
        if fd < _FIRST_FD:
            return fcntl.flock(fd, how)
        with self._changed:
            ino, _, _ = self._inode(fd)
            wanted = how & ~fcntl.LOCK_NB
            held = self._locks.setdefault(ino, {})

            def is_free() -> bool:
                others = [kind for other, kind in held.items() if other != fd]
                return not others or (wanted == fcntl.LOCK_SH and fcntl.LOCK_EX not in others)

            if wanted == fcntl.LOCK_UN:
                held.pop(fd, None)
                self._changed.notify_all()
                return None
            if how & fcntl.LOCK_NB and not is_free():
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
            if not self._changed.wait_for(is_free, timeout=60):
                raise AssertionError("a lock was waited for a minute: nobody will release it")
            held[fd] = wanted
        return None

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        if self._real(path):
            return os.mkdir(path, mode)
        text = os.fspath(path)
        with self._changed:
            self._enter("create", text)
            parent, name = self._parent(text)
            if name in self.disk.inodes[parent].entries:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), text)
            self._make(parent, name, "dir", mode)
        return None

    def rmdir(self, path: Any) -> None:
        if self._real(path):
            return os.rmdir(path)
        text = os.fspath(path)
        with self._changed:
            self._enter("unlink", text)
            if self.disk.inodes[self._find(text)].entries:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), text)
            parent, name = self._parent(text)
            return self._do(Op("unlink", parent, (name,), self._label()))

    def listdir(self, path: Any) -> list[str]:
        if self._real(path):
            return os.listdir(path)
        with self._changed:
            self._enter("list", os.fspath(path))
            inode = self.disk.inodes[self._find(os.fspath(path))]
            if inode.kind != "dir":
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            return list(inode.entries)

    def rename(self, source: Any, target: Any) -> None:
        if self._real(source):
            return os.rename(source, target)
        old, new = os.fspath(source), os.fspath(target)
        with self._changed:
            self._enter("rename", new)
            ino = self._find(old, follow=False)
            parent, name = self._parent(new)
            old_parent, old_name = self._parent(old)
            if parent != old_parent:
                raise AssertionError("no file is moved between directories: that is not atomic in any order of syncs")
            return self._do(Op("rename", parent, (old_name, name, ino), self._label()))

    def link(self, source: Any, target: Any) -> None:
        if self._real(source):
            return os.link(source, target)
        new = os.fspath(target)
        with self._changed:
            self._enter("create", new)
            ino = self._find(os.fspath(source), follow=False)
            parent, name = self._parent(new)
            if name in self.disk.inodes[parent].entries:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
            return self._do(Op("link", parent, (name, ino)))

    def unlink(self, path: Any) -> None:
        if self._real(path):
            return os.unlink(path)
        text = os.fspath(path)
        with self._changed:
            self._enter("unlink", text)
            parent, name = self._parent(text)
            if name not in self.disk.inodes[parent].entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
            return self._do(Op("unlink", parent, (name,), self._label()))

    def symlink(self, target: Any, path: Any) -> None:
        if self._real(path):
            return os.symlink(target, path)
        text = os.fspath(path)
        with self._changed:
            self._enter("create", text)
            parent, name = self._parent(text)
            if name in self.disk.inodes[parent].entries:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), text)
            self._make(parent, name, "link", 0o777, os.fspath(target))
        return None

    def readlink(self, path: Any) -> str:
        if self._real(path):
            return os.readlink(path)
        with self._changed:
            return self.disk.inodes[self._find(os.fspath(path), follow=False)].target

    # --- for tests ---

    def note(self, value: object) -> None:
        """Remember, at this place of the log, what was promised or is so."""
        with self._changed:
            self._do(Op("note", 1, (value,)))

    @property
    def open_paths(self) -> list[str]:
        with self._changed:
            return sorted(path for _, _, path in self._fds.values())


def _nobody() -> str:
    return ""


def caller() -> str:
    """The call site that asked for a system call: module, function, and the function of `durable` it called."""
    frame, durable = sys._getframe(2), ""
    while frame is not None:
        name = Path(frame.f_code.co_filename).name
        if name == "durable.py":
            durable = frame.f_code.co_name
        elif name not in _OWN:
            return f"{name}:{frame.f_code.co_name} {durable}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def replay(
    start: Disk, log: Sequence[Op], without: Callable[[Op], bool] = lambda _op: False
) -> Iterator[tuple[Op, Disk]]:
    """Every change of the log and the disk after it (the same object, changed by what follows)."""
    disk = start.copy()
    for op in log:
        if not (op.kind == "fsync" and without(op)):
            disk.apply(op)
        yield op, disk


__all__ = ["ROOT", "Content", "Disk", "Kernel", "Op", "PowerCut", "crash_states", "replay", "torn"]
