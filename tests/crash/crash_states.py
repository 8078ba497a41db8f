"""What a power cut may leave of a disk: every state that the file system is allowed to come back with.

After operation k of a log, what was synced is there. Of everything else, each by itself:

- a write is lost, kept, or torn at a boundary of 512 bytes or of 4 KiB, the first part kept or the last; or only the
  size it gave the file is kept, and zeros (delayed allocation);
- a later write is kept and an earlier one lost: nothing orders them but fsync;
- a hole is lost, kept, or half punched;
- a change of the size is lost or kept;
- a name that was made, removed or renamed is lost or kept; a rename leaves the old name or the new one, never both;
- after an fsync that failed, what it was to write is never written, unless it is written again; later fsyncs succeed.

Assumed of the file system (docs/CRASH.md says so, too):

- an fsync that succeeds is true: of a file for its content and size, not for its name; of a directory for its names;
- a sector of 512 bytes is written wholly or not at all, and one file's changes of size arrive in their order;
- what was synced stays as it is, also when a write next to it is torn.

A *choice* gives each pending operation a variant; 0 is lost. `choices` makes all of them where there are at most
`EXHAUSTIVE`, else: every single loss, every single survivor, every prefix, every tear with all or none of the others,
and seeded samples.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.crash.memory_disk import PAGE, ROOT, Content, Op, Tree

EXHAUSTIVE = 256
SAMPLES = 16

Choice = tuple[int, ...]


class CrashModel:
    """What is durable of one disk, and what is pending. Fed with the operations in their order."""

    def __init__(self, tree: Tree | None = None) -> None:
        tree = {ROOT: {}} if tree is None else tree
        self.durable: Tree = {n: dict(node) if isinstance(node, dict) else node for n, node in tree.items()}
        self.pending: list[Op] = []

    def apply(self, op: Op) -> None:
        if op.kind == "new" or op.kind == "set":
            (self.durable[op.inode],) = op.args
        elif op.kind in ("sync", "failed-sync"):
            if op.kind == "sync":
                self._keep([p for p in self.pending if p.inode == op.inode])
            self.pending = [p for p in self.pending if p.inode != op.inode]
            self._forget()
        elif op.kind != "nothing":
            self.pending.append(op)

    def _forget(self) -> None:
        """Of what cannot come back under any name, nothing is pending."""
        named = {ROOT}
        for node in self.durable.values():
            if isinstance(node, dict):
                named.update(node.values())
        for op in self.pending:
            if op.kind in ("add", "rename"):
                named.add(op.args[-1])
        self.pending = [op for op in self.pending if op.inode in named]

    def _keep(self, ops: Sequence[Op]) -> None:
        for op in ops:
            self.durable[op.inode] = kept(op, self.durable.get(op.inode, Content()), 1)

    def state(self, choice: Choice) -> Tree:
        """The disk after the cut. Only what has a name."""
        nodes = dict(self.durable)
        for op, variant in zip(self.pending, choice, strict=True):
            if variant:
                nodes[op.inode] = kept(op, nodes.get(op.inode, Content()), variant)
        found: Tree = {}

        def visit(number: int) -> None:
            node = found[number] = nodes.get(number, Content())
            if isinstance(node, dict):
                for child in node.values():
                    if child not in found:
                        visit(child)

        visit(ROOT)
        return found

    def choices(self, rng: random.Random) -> Iterator[Choice]:
        """Those in which the newest operation is not lost; all others were there one step earlier."""
        for choice in _choices([variants(op) for op in self.pending], rng):
            yield self._ordered(choice)

    def _ordered(self, choice: Choice) -> Choice:
        """A change of size is kept only with those before it of the same file."""
        needed: set[int] = set()
        fixed = list(choice)
        for index in range(len(fixed) - 1, -1, -1):
            op = self.pending[index]
            if op.kind != "size":
                continue
            if op.inode in needed:
                fixed[index] = 1
            elif fixed[index]:
                needed.add(op.inode)
        return tuple(fixed)


def _choices(counts: Sequence[int], rng: random.Random) -> Iterator[Choice]:
    if not counts:
        yield ()
        return
    older, newest = len(counts) - 1, range(1, counts[-1])
    if math.prod(counts[:-1]) * len(newest) <= EXHAUSTIVE:
        for rest in itertools.product(*(range(count) for count in counts[:-1])):
            for last in newest:
                yield (*rest, last)
        return
    if 2**older * len(newest) <= EXHAUSTIVE:
        for rest in itertools.product((0, 1), repeat=older):
            for last in newest:
                yield (*rest, last)
    else:
        none, every = (0,) * older, (1,) * older
        for last in newest:
            yield (*none, last)
            yield (*every, last)
        for index in range(older):
            yield (*every[:index], 0, *every[index + 1 :], 1)
            yield (*none[:index], 1, *none[index + 1 :], 1)
            yield (*every[:index], *none[index:], 1)
    for _ in range(SAMPLES if older else 0):
        yield (*(rng.randrange(count) for count in counts[:-1]), rng.choice(newest))


def _boundaries(start: int, stop: int) -> list[int]:
    """Where a write is torn: its first and last sector boundary, its first page boundary."""
    sectors = range(start - start % 512 + 512, stop, 512)
    pages = range(start - start % PAGE + PAGE, stop, PAGE)
    return sorted({*sectors[:1], *sectors[-1:], *pages[:1]})


def variants(op: Op) -> int:
    """How many ways there are for an operation to come out: 0 lost, 1 kept, then torn ones."""
    if op.kind == "write":
        offset, data = op.args
        return 3 + 2 * len(_boundaries(offset, offset + len(data)))
    if op.kind == "hole":
        return 3 if op.args[1] > PAGE else 2
    return 2


def kept(op: Op, node: Any, variant: int) -> Any:
    """What `op` makes of its file or directory, in one of its variants."""
    if op.kind == "write":
        return _torn(node, op, variant)
    if op.kind == "size":
        return node.resized(op.args[0])
    if op.kind == "hole":
        offset, length = op.args
        return node.punched(offset, length if variant == 1 else length // 2 // PAGE * PAGE or 512)
    names = dict(node)
    if op.kind == "add":
        names[op.args[0]] = op.args[1]
    elif op.kind == "drop":
        names.pop(op.args[0], None)
    else:
        old, new, number = op.args
        names.pop(old, None)
        names[new] = number
    return names


def _torn(node: Content, op: Op, variant: int) -> Content:
    offset, data = op.args
    if variant == 1:
        return node.written(offset, data)
    if variant == 2:  # the size only
        return node.resized(max(node.size, offset + len(data)))
    which, last = divmod(variant - 3, 2)
    cut = _boundaries(offset, offset + len(data))[which] - offset
    return node.written(offset + cut, data[cut:]) if last else node.written(offset, data[:cut])


def digest(tree: Tree, ignored: Callable[[str], bool] = lambda _path: False) -> int:
    """Equal for disks that look the same, but for the content of files that are `ignored`."""
    parts: list[tuple[str, object]] = []
    todo = [(ROOT, "")]
    while todo:
        number, path = todo.pop()
        node = tree[number]
        if isinstance(node, dict):
            parts.append((path, "directory"))
            todo += [(child, f"{path}/{name}") for name, child in node.items()]
        else:
            parts.append((path, "file" if ignored(path) else node))
    return hash(frozenset(parts))
