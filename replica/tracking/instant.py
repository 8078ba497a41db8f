"""One instant of all of a machine's disks: freeze, read, thaw; or a source that stood still.

    with freeze(fs, directory, machine, sources, spec) as snapshot:
        ...                              # open every snapshot.paths[disk], tell snapshot.opened
        ...                              # read them all; now and then snapshot.check()
        ...                              # close them: thaw may remove what is read
        snapshot.finish()                # all is read: thaw, or prove that nothing moved

Only when `finish` returned was what was read one instant. Left without it, the
block thaws and whatever was read is worth nothing.

**With commands**, both run by the watchdog (see there), in this order: the mark
`frozen` is made durable, `freeze` runs, the disks are read, `thaw` runs, the mark
goes. The watchdog thaws when the sender dies or `limit_seconds` passed since
`freeze` started; a point that was still being read then is refused. When the
watchdog itself was killed, a second one thaws at once and the point is refused.
A machine that is marked is thawed before anything else is done with it
(`thaw_marked`).

The commands find in their environment: REPLICA_MACHINE; REPLICA_DISKS, the
number of disks; REPLICA_DISK_<n>_NAME and REPLICA_DISK_<n>_IMAGE with n from 0.
`freeze` may print lines `disk-name=/path` (or an NBD URI): that disk is then read there (a
snapshot it took), not at its image; `thaw` is the place to remove it.

**Without**, see `still`.

Snapshots by reflink and bitmaps of hypervisors fit behind the same value: they
are other `paths`, and a `dirty` that knows something.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from replica import documents
from replica.durable import FileSystem
from replica.errors import ConfigError, FormatError, FreezeError, SourceBusyError, StorageError
from replica.images.image import ImageFile
from replica.images.nbd_uri import is_uri, location
from replica.model import Consistency
from replica.tracking.guard import THAW_AGAIN_SECONDS, THAW_LIMIT_SECONDS, Answer, Guard
from replica.tracking.still import StandStill, take_stamp

if TYPE_CHECKING:
    from replica.bitmap import DirtyBitmap

Command = str | Sequence[str]
_MARK = "frozen"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreezeSpec:
    """How a machine's instant is made. Without `freeze`, its images must stand still.

    ConfigError for a command that no system can run: an empty one, or one with a NUL in it.
    """

    freeze: Command | None = None
    thaw: Command | None = None
    limit_seconds: float = 30.0
    consistency: Consistency = Consistency.CRASH
    offline: frozenset[str] = frozenset()
    """Disks that are vouched for where nothing freezes and nothing can be proven (`still`)."""

    def __post_init__(self) -> None:
        for name, command in (("freeze", self.freeze), ("thaw", self.thaw)):
            if command is None:
                continue
            if not command or not command[0].strip() or (isinstance(command, str) and not command.strip()):
                raise ConfigError(f"`{name}` is an empty command", hint="name a command, or leave both out")
            if any("\0" in part for part in _argv(command)):
                raise ConfigError(f"`{name}` has a NUL character in it, which no command can have", hint="remove it")


class FrozenMark(msgspec.Struct, frozen=True):
    """The durable mark of a machine that may be frozen: how to thaw it."""

    machine: str
    since_ns: int
    thaw: list[str]
    environment: dict[str, str]


class Snapshot(Protocol):
    """All disks at one instant. Made by `freeze`; a context manager that always thaws."""

    @property
    def paths(self) -> Mapping[str, Path]:
        """Disk name -> what to read."""
        ...

    @property
    def frozen_at_ns(self) -> int:
        """The instant, before the first read."""
        ...

    @property
    def consistency(self) -> Consistency: ...

    def dirty(self, disk: str) -> DirtyBitmap | None:
        """Which grains may have changed since the last committed point; None: unknown, hash all."""
        ...

    def opened(self, disk: str, files: Sequence[ImageFile]) -> None:
        """The disk's image was opened: these files, its own first. SourceBusyError: it is not what was frozen."""
        ...

    def check(self) -> None:
        """Cheap, to be called between reads. FreezeError once the instant cannot be had any more."""
        ...

    def finish(self) -> None:
        """All is read. FreezeError or SourceBusyError: it was no single instant, use nothing of it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def freeze(fs: FileSystem, directory: Path, machine: str, images: Mapping[str, Path], spec: FreezeSpec) -> Snapshot:
    """Begin the instant. `directory` is the machine's state directory, `images` disk name -> image.

    Raises FreezeError (the command failed; the machine was thawed) or SourceBusyError (it does not stand still).
    """
    if spec.freeze is None:
        return _StillSnapshot(fs, images, spec.offline)
    thaw_marked(fs, directory, spec, images)
    return _FrozenSnapshot(fs, directory, machine, images, spec)


def thaw_marked(
    fs: FileSystem, directory: Path, spec: FreezeSpec, images: Mapping[str, Path] = MappingProxyType({})
) -> bool:
    """Thaw the machine if an earlier freeze may still hold; True if it was marked. FreezeError if thawing fails.

    The configuration's command wins over the marked one, so that a wrong one can be corrected. The marked environment
    names the disks that were frozen; `images` are those of the configuration, where the mark cannot be read.
    """
    path = directory / _MARK
    if not fs.exists(path):
        return False
    try:
        mark = documents.load(fs, path, FrozenMark)
    except (FormatError, StorageError):  # a guest that hangs does not wait until its mark can be read
        mark = FrozenMark(directory.name, 0, [], environment_of(directory.name, images))
    argv = _argv(spec.thaw) or mark.thaw
    if not argv:
        raise FreezeError(
            f"machine {mark.machine!r} may still be frozen and no `thaw` command is known",
            hint=f"thaw it by hand, then remove {path}",
        )
    answer = _thaw_only(path, argv, spec.limit_seconds, mark.environment)
    if not answer.thawed:
        raise FreezeError(
            f"machine {mark.machine!r} is still frozen, thawing it failed: {answer.failure}",
            hint="correct its `thaw` command or thaw it by hand; every cycle tries again",
        )
    return True


def _thaw_only(
    mark: Path,
    thaw: list[str],
    limit_seconds: float,
    environment: dict[str, str],
    *,
    again_seconds: tuple[float, ...] = (),
) -> Answer:
    """A watchdog that thaws now, once no other one is at it. FreezeError if it cannot be started."""
    guard = Guard()
    guard.order(mark, [], thaw, limit_seconds, environment, again_seconds=again_seconds)
    guard.request_thaw()
    answer = guard.ask("thawed", limit_seconds + 2 * THAW_LIMIT_SECONDS)
    guard.end()
    return answer


class _StillSnapshot:
    """Nothing freezes: the images themselves, proven to have stood still."""

    consistency = Consistency.CRASH

    def __init__(self, fs: FileSystem, images: Mapping[str, Path], offline: frozenset[str]) -> None:
        self.paths = dict(images)
        self._proof = StandStill(fs, images, offline=offline)
        self.frozen_at_ns = time.time_ns()

    def dirty(self, disk: str) -> DirtyBitmap | None:
        return None

    def opened(self, disk: str, files: Sequence[ImageFile]) -> None:
        self._proof.opened(disk, files)

    def check(self) -> None:
        """Nothing can be said before the end."""

    def finish(self) -> None:
        self._proof.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was frozen."""
        self._proof.close()


class Running:
    """No instant at all: images of a machine that goes on. What is read of them can be a part of a copy, no point."""

    consistency = Consistency.CRASH

    def __init__(self, images: Mapping[str, Path]) -> None:
        self.paths = dict(images)
        self.frozen_at_ns = time.time_ns()

    def dirty(self, disk: str) -> DirtyBitmap | None:
        return None

    def opened(self, disk: str, files: Sequence[ImageFile]) -> None:
        """Whatever is there is read."""

    def check(self) -> None:
        """Nothing is promised."""

    def finish(self) -> None:
        """Nothing is promised."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was frozen."""


class _FrozenSnapshot:
    """Between the freeze and the thaw command."""

    def __init__(
        self, fs: FileSystem, directory: Path, machine: str, images: Mapping[str, Path], spec: FreezeSpec
    ) -> None:
        assert spec.freeze is not None
        self._fs, self._machine, self._limit_seconds = fs, machine, spec.limit_seconds
        self.consistency = spec.consistency
        self._mark, self._thaw, self._environment = directory / _MARK, _argv(spec.thaw), environment_of(machine, images)
        guard = Guard()
        try:
            mark = FrozenMark(machine, time.time_ns(), self._thaw, self._environment)
            documents.save(fs, self._mark, mark, private=True)
        except BaseException:
            guard.end()
            raise
        self._deadline = time.monotonic() + spec.limit_seconds
        self._guard: Guard | None = guard
        try:
            argv = _argv(spec.freeze)
            guard.order(
                self._mark, argv, self._thaw, spec.limit_seconds, self._environment, again_seconds=THAW_AGAIN_SECONDS
            )
            answer = guard.ask("frozen", spec.limit_seconds + THAW_LIMIT_SECONDS)
            if not answer.frozen:
                raise FreezeError(
                    f"freezing machine {machine!r} failed: {answer.failure}",
                    hint="no point was made; run its `freeze` command by hand to see why, and `thaw` after it",
                )
            self.paths = snapshot_paths(images, answer.output)
            live = [path for disk, path in self.paths.items() if path == images[disk] and path.is_file()]
            self._live = {path: take_stamp(fs, path) for path in live}
            self.frozen_at_ns = time.time_ns()
        except BaseException:
            self._release()
            raise

    def dirty(self, disk: str) -> DirtyBitmap | None:
        return None

    def opened(self, disk: str, files: Sequence[ImageFile]) -> None:
        """Whatever `freeze` named is what counts; the parents of a live image must not be written either."""
        if self.paths[disk] in self._live:
            self._live.update({file.path: take_stamp(self._fs, file.path) for file in files[1:]})

    def check(self) -> None:
        if time.monotonic() > self._deadline:
            raise self._too_long()
        if self._guard is not None and not self._guard.alive():
            raise FreezeError(f"the watchdog process of machine {self._machine!r} was killed: no point can be made")

    def finish(self) -> None:
        written = [path for path, stamp in self._live.items() if take_stamp(self._fs, path) != stamp]
        if self._release() != "request":
            raise self._too_long()
        if written:
            raise SourceBusyError(
                f"image {written[0]} was written although machine {self._machine!r} was frozen: no point was made",
                hint="let `freeze` stop whatever writes to it, or take a snapshot and print disk=/path of it",
            )

    def _release(self) -> str:
        """Thaw; what made the watchdog do it. FreezeError if the thaw failed: the guest may hang."""
        if self._guard is None:
            return "earlier"
        guard, self._guard = self._guard, None
        guard.request_thaw()
        answer = guard.ask("thawed", 2 * THAW_LIMIT_SECONDS)
        gone = not answer.thawed and not guard.alive()
        guard.end()
        if gone and not answer.about:
            return self._second_guard()
        if not answer.thawed:
            raise self._not_thawed(answer)
        return answer.cause

    def _second_guard(self) -> str:
        """The watchdog was killed (by a host without memory, say), so nobody else will thaw: do it, and refuse."""
        try:
            answer = _thaw_only(
                self._mark, self._thaw, self._limit_seconds, self._environment, again_seconds=THAW_AGAIN_SECONDS
            )
        except FreezeError as error:
            answer = Answer(failure=error.message)
        if not answer.thawed:
            raise self._not_thawed(answer)
        raise FreezeError(
            f"the watchdog process of machine {self._machine!r} was killed: "
            "the machine was thawed by a second one and no point was made",
            hint="look for what killed it (the host's memory?); the next cycle tries again",
        )

    def _not_thawed(self, answer: Answer) -> FreezeError:
        error = FreezeError(
            f"thawing machine {self._machine!r} failed: {answer.failure}",
            hint="it may be frozen: thaw it by hand; every cycle tries again before it does anything else",
        )
        _log.critical("%s", error)
        return error

    def _too_long(self) -> FreezeError:
        return FreezeError(
            f"machine {self._machine!r} was frozen for longer than its limit of {self._limit_seconds:g} s: "
            "it was thawed and no point was made",
            hint="raise `freeze_limit`, or let `freeze` take a snapshot and name its path",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()


def environment_of(machine: str, images: Mapping[str, Path]) -> dict[str, str]:
    """What the commands find in their environment beside the sender's own."""
    environment = {"REPLICA_MACHINE": machine, "REPLICA_DISKS": str(len(images))}
    for number, (name, image) in enumerate(images.items()):
        environment[f"REPLICA_DISK_{number}_NAME"] = name
        environment[f"REPLICA_DISK_{number}_IMAGE"] = str(image)
    return environment


def snapshot_paths(images: Mapping[str, Path], output: str) -> dict[str, Path]:
    """Where to read each disk: where the freeze command's output says `disk-name=/path`, else its image.

    Commands say many things, so other lines are ignored; but one that says where *something* is, while no disk is
    named or but for upper and lower case one is, was meant for a disk and missed it. FreezeError then, and if the
    path of a disk is not absolute.
    """
    named: dict[str, Path] = {}
    others: list[str] = []
    folded = {name.casefold() for name in images}
    for line in output.splitlines():
        name, equals, path = line.strip().partition("=")
        if equals and name in images:
            if not path.startswith("/") and not is_uri(path):
                raise FreezeError(
                    f"the freeze command names {path!r} for disk {name!r}", hint="print an absolute path: name=/path"
                )
            named[name] = location(path)
        elif equals and path.startswith("/"):
            others.append(name)
    missed = [name for name in others if name.casefold() in folded] or ([] if named else others)
    if missed:
        raise FreezeError(
            f"the freeze command names a path for {missed[0]!r}, which is no disk of the machine",
            hint=f"print disk=/path for these disks: {', '.join(images)}; nothing else it says may look like that",
        )
    return {**images, **named}


def marked(fs: FileSystem, directory: Path) -> bool:
    """Whether the machine of that state directory may be frozen."""
    return fs.exists(directory / _MARK)


def _argv(command: Command | None) -> list[str]:
    if command is None:
        return []
    return ["sh", "-c", command] if isinstance(command, str) else list(command)
