"""The recovery points of a replica: the chain of inverses that hangs from its head.

There is no list of points anywhere. A file in `points/` is an inverse whose
sealed manifest names two states, `base` (newer) and `result` (older); the
points are what can be reached from the head by following those links, but for
the steps of a long copy (`State.partial`). File names are never trusted for it,
so that a file in the wrong place changes nothing.

While a delta is being applied (`state.applying`) the head may be half written.
Its inverse is in place by then, so the walk starts one step earlier, at the
state being made: the newest committed point is read through that inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from replica import documents
from replica.delta import DeltaFileReader, Keyring
from replica.durable import FileSystem
from replica.errors import DamageError, KeyMissingError, StorageError
from replica.model import State
from replica.store.layout import Layout, StoreState

LOOKS = 100
"""How often the directory is looked at until nothing changed meanwhile; the last look counts whatever it was."""


@dataclass(frozen=True, slots=True)
class Link:
    """One inverse: applied to `base` it gives `result`."""

    path: Path
    base: State
    result: State
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class PointInfo:
    """One listed point. `stored_bytes` is what it takes in the store: its inverse, or the head."""

    state: State
    stored_bytes: int
    restorable: bool


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
    def points(self) -> tuple[State, ...]:
        """The states that are listed, oldest first."""
        older = [link.result for link in self.links if link is not self.undoing]
        return tuple(state for state in (*reversed(older), self.state.head) if state.is_point)

    def since(self, top: State) -> tuple[Link, ...] | None:
        """The links between `top` and the head, nearest `top` first; None if `top` is not on the chain (any more)."""
        if top == self.top:
            return ()
        for index, link in enumerate(self.links):
            if link.result == top:
                return self.links[index::-1]
        return None


class PointIndex:
    """Reads `points/`; remembers the files it has opened, which never change. Not thread-safe."""

    def __init__(self, fs: FileSystem, layout: Layout, keyring: Keyring) -> None:
        self._fs = fs
        self._layout = layout
        self._keyring = keyring
        self._known: dict[str, Link] = {}
        self._damaged: set[str] = set()

    def copy(self) -> PointIndex:
        """Another index that knows what this one knows, for another thread."""
        other = PointIndex(self._fs, self._layout, self._keyring)
        other._known, other._damaged = dict(self._known), set(self._damaged)
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
        self._damaged &= names
        for name in names - self._known.keys() - self._damaged:
            self._open(name)
        return list(self._known.values())

    def _open(self, name: str) -> None:
        path = self._layout.points / name
        try:
            with DeltaFileReader(self._fs.open(path), self._keyring) as reader:
                self._known[name] = Link(path, reader.base, reader.result, reader.stored_bytes)
        except KeyMissingError:
            raise
        except DamageError:
            self._damaged.add(name)
        except StorageError:
            if self._fs.exists(path):  # else it was rotated out just now
                raise

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
        state = documents.load(self._fs, self._layout.state, StoreState)
        return state, [name for name in self._fs.list_names(self._layout.points) if not name.startswith(".")]


def _assemble(state: StoreState, links: list[Link], *, torn: bool) -> Chain:
    by_base = {link.base.delta_id: link for link in links}
    found: list[Link] = []
    if state.applying is not None:
        undoing = by_base.get(state.applying)
        if undoing is not None and undoing.result == state.head:
            found.append(by_base.pop(state.applying))
    current = state.head
    while (link := by_base.get(current.delta_id)) is not None and link.base == current:
        found.append(by_base.pop(current.delta_id))
        current = link.result
    return Chain(state, tuple(found), tuple(by_base.values()), torn)
