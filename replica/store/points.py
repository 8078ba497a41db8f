"""The recovery points of a replica: the chain of inverses that hangs from its head.

There is no list of points anywhere. A file in `points/` is an inverse whose
sealed manifest names two states, `base` (newer) and `result` (older); the
points are what can be reached from the head by following those links, but for
the steps of a long copy (`State.partial`). File names are never trusted for it,
so that a file in the wrong place changes nothing.

Thinning writes an inverse that leads over several states at once before it removes the ones it replaces (`thin`), and a
crash may leave both. So the links are no list but a graph without circles, and the chain is the way through it that
leads farthest back, and of those that lead there the one with the most states: what is not removed yet is listed.
Links that can be reached but are not on that way are *spare*: what they lead to can be reached without them, or had
been given up when they were to be removed. Links that cannot be reached are *strays*: damage, and never removed.

While a delta is being applied (`state.applying`) the head may be half written.
Its inverse is in place by then, so the walk starts one step earlier, at the
state being made: the newest committed point is read through that inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from replica.delta import DeltaFileReader, Keyring
from replica.durable import FileSystem
from replica.errors import DamageError, KeyMissingError, StorageError
from replica.model import NEVER, DeltaId, DiskId, Stamp, State
from replica.store.layout import Layout, StoreState, load_state

Stat = tuple[int, int, int, int]
"""By which a file is known again: inode, size, times of change."""

LOOKS = 100
"""How often the directory is looked at until nothing changed meanwhile; the last look counts whatever it was."""


@dataclass(frozen=True, slots=True)
class Link:
    """One inverse: applied to `base` it gives `result`."""

    path: Path
    base: State
    result: State
    stored_bytes: int
    committed: Stamp = NEVER
    """When `result` had been committed here."""
    lost: bool = False
    """There is something in it that nobody has any more."""


class LostRange(NamedTuple):
    """A range of a disk, in bytes, that is lost at a point."""

    disk: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class PointInfo:
    """One listed point. `stored_bytes` is what it takes in the store: its inverse, or the head; 0 if that inverse
    does not open.

    `lost`: the first ranges that nobody has any more. A point that has some is not `restorable`; all the rest of it is.
    `reason`: why it is not restorable, where an inverse is the cause.
    """

    state: State
    stored_bytes: int
    restorable: bool
    committed: Stamp = NEVER
    lost: tuple[LostRange, ...] = ()
    reason: str = ""

    @property
    def why(self) -> str:
        """Why it is not restorable, in words; empty if it is."""
        if self.restorable:
            return ""
        if self.reason or not self.lost:
            return self.reason or "what it needs cannot be read"
        first, more = self.lost[0], f" and {len(self.lost) - 1} more ranges" if len(self.lost) > 1 else ""
        last = first.offset + first.length - 1
        return f"disk {first.disk!r}, bytes {first.offset} to {last}{more}: lost, or damaged in the head"


@dataclass(frozen=True, slots=True)
class Chain:
    """A consistent look at the points: `links[0]` leads from the newest state to the one before.

    `torn`: the head may be half written and the inverse that covers it cannot be read, so nothing that needs
    the head can be read until a receiver has finished that commit.
    """

    state: StoreState
    links: tuple[Link, ...]
    strays: tuple[Link, ...]
    torn: bool
    spare: tuple[Link, ...] = ()
    """Farthest from the head first: the order in which they may be removed."""

    @property
    def top(self) -> State:
        """The state that the head's bytes belong to: while a delta is applied, the one it makes."""
        return self.links[0].base if self.links else self.state.head

    @property
    def undoing(self) -> Link | None:
        """The inverse of what is being applied."""
        return self.links[0] if self.links and self.links[0].result == self.state.head else None

    def to(self, point: int | None) -> tuple[State, tuple[Link, ...]] | None:
        """A point's state and the links that lead to it, nearest the point first; None if it is not there."""
        head = self.state.head
        found = [self.undoing] if self.undoing is not None else []
        if head.is_point and point in (None, head.point):
            return head, tuple(found)
        for link in self.links[len(found) :]:
            found.insert(0, link)
            if link.result.is_point and point in (None, link.result.point):
                return link.result, tuple(found)
        return None

    @property
    def from_head(self) -> dict[DeltaId, frozenset[DiskId]]:
        """For the states on the way, and the head's: the disks that they may read from the head's images.

        One that was not there in between is another disk by now, though it has the same id.
        """
        disks = frozenset(entry.disk.id for entry in self.top.disks)
        found = {self.top.delta_id: disks}
        for link in self.links:
            disks &= {entry.disk.id for entry in link.result.disks}
            found[link.result.delta_id] = disks
        return found

    @property
    def points(self) -> tuple[State, ...]:
        """The states that are listed, oldest first."""
        older = [link.result for link in self.links if link is not self.undoing]
        return tuple(state for state in (*reversed(older), self.state.head) if state.is_point)

    @property
    def committed_points(self) -> tuple[tuple[State, Stamp], ...]:
        """The points, oldest first, and when each was committed."""
        links = [link for link in reversed(self.links) if link is not self.undoing]
        found = [*((link.result, link.committed) for link in links), (self.state.head, self.state.committed)]
        return tuple((state, committed) for state, committed in found if state.is_point)

    @property
    def named(self) -> tuple[State, ...]:
        """Every state that the head or any inverse names, reachable or not."""
        return (self.state.head, *(s for link in (*self.links, *self.strays) for s in (link.base, link.result)))

    def since(self, top: State) -> tuple[Link, ...] | None:
        """The links between `top` and the head, nearest `top` first; None if `top` is not on the chain (any more)."""
        if top == self.top:
            return ()
        for index, link in enumerate(self.links):
            if link.result == top:
                return self.links[index::-1]
        return None


class PointIndex:
    """Reads `points/`; remembers the files it has opened, which never change. Not thread-safe.

    One that did not open is tried again when it is not the same file any more: it may have been put back.
    """

    def __init__(self, fs: FileSystem, layout: Layout, keyring: Keyring) -> None:
        self._fs = fs
        self._layout = layout
        self._keyring = keyring
        self._known: dict[str, Link] = {}
        self._damaged: dict[str, Stat | None] = {}

    def copy(self) -> PointIndex:
        """Another index that knows what this one knows, for another thread."""
        other = PointIndex(self._fs, self._layout, self._keyring)
        other._known, other._damaged = dict(self._known), dict(self._damaged)
        return other

    @property
    def damaged(self) -> list[Path]:
        """Files that were in `points/` at the last look and are no readable inverse."""
        return sorted(self._layout.points / name for name in self._damaged)

    def links(self) -> list[Link]:
        """Every readable inverse that is in the directory now; `damaged` are the others.

        KeyMissingError or StorageError if one can't be looked at: no list is better than a list that hides points.
        """
        names = {name for name in self._fs.list_names(self._layout.points) if not name.startswith(".")}
        self._known = {name: link for name, link in self._known.items() if name in names}
        self._damaged = {n: seen for n, seen in self._damaged.items() if n in names and seen == self._stat(n)}
        for name in names - self._known.keys() - self._damaged.keys():
            self._open(name)
        return list(self._known.values())

    def _open(self, name: str) -> None:
        path = self._layout.points / name
        seen = self._stat(name)
        try:
            with DeltaFileReader(self._fs.open(path), self._keyring) as reader:
                self._known[name] = Link(
                    path, reader.base, reader.result, reader.stored_bytes, reader.committed, reader.marks_lost
                )
        except KeyMissingError:
            raise
        except DamageError:
            self._damaged[name] = seen
        except StorageError:
            if self._fs.exists(path):  # else it was rotated out just now
                raise

    def _stat(self, name: str) -> Stat | None:
        try:
            found = self._fs.stat(self._layout.points / name)
        except StorageError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def chain(self) -> Chain:
        """Look at state and links until they belong together (a commit or a rotation may be under way)."""
        for _ in range(LOOKS):
            before = self._look()
            links = self.links()
            chain = _assemble(before[0], links, torn=str(before[0].applying) in self._damaged)
            if self._look() == before:
                break
        return chain

    def _look(self) -> tuple[StoreState, list[str]]:
        state = load_state(self._fs, self._layout)
        return state, [name for name in self._fs.list_names(self._layout.points) if not name.startswith(".")]


def _assemble(state: StoreState, links: list[Link], *, torn: bool) -> Chain:
    from_base: dict[DeltaId, list[Link]] = {}
    undoing: list[Link] = []
    for link in links:
        if not undoing and link.base.delta_id == state.applying and link.result == state.head:
            undoing.append(link)
        else:
            from_base.setdefault(link.base.delta_id, []).append(link)
    order = _reachable(state.head, from_base)
    depth, by = _longest(state.head, order)
    oldest = min(depth, key=lambda state: (state.point, state.partial, -depth[state]), default=state.head)
    way: list[Link] = []
    while oldest in by:
        way.append(by[oldest])
        oldest = by[oldest].base
    on_way, reached = {link.path for link in way}, {link.path for link in order}
    spare = [link for link in order if link.path not in on_way]
    spare.sort(key=lambda link: depth[link.base], reverse=True)
    seen = reached | {link.path for link in undoing}
    strays = tuple(link for link in links if link.path not in seen)
    return Chain(state, (*undoing, *reversed(way)), strays, torn, tuple(spare))


def _reachable(head: State, from_base: dict[DeltaId, list[Link]]) -> list[Link]:
    """Every link that can be reached from the head, each after all that lead to its base."""
    finished: list[Link] = []
    seen: set[DeltaId] = set()
    stack: list[tuple[State, Link | None, bool]] = [(head, None, False)]
    while stack:
        state, via, done = stack.pop()
        if done:
            if via is not None:
                finished.append(via)
            continue
        stack.append((state, via, True))
        if state.delta_id in seen:
            continue
        seen.add(state.delta_id)
        stack.extend((link.result, link, False) for link in from_base.get(state.delta_id, ()) if link.base == state)
    return finished[::-1]


def _longest(head: State, links: list[Link]) -> tuple[dict[State, int], dict[State, Link]]:
    """For every state the most steps in which it can be reached, and the last of them."""
    depth, by = {head: 0}, {}
    for link in links:
        if depth[link.base] + 1 > depth.get(link.result, 0):
            depth[link.result], by[link.result] = depth[link.base] + 1, link
    return depth, by
