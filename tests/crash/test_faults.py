"""The disk fails at every single call of a sync, at the sender and at the receiver, in every way it can.

    permitted: EIO of any call; ENOSPC of what needs space; an fsync that fails once, loses what it was to write (which
    stays visible), and succeeds from then on; a file system that becomes read-only until it is mended; short reads
    and writes

Each time: the sync ends with an error of the engine that says so, or not at all; when the cause is gone the next sync
makes the next point by itself, in the same processes and in new ones; nothing acknowledged is lost, also when the power
goes right afterwards; what is shipped is what differs; nothing is left over.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replica.durable import FileSystem
from replica.errors import DamageError, ImageError, ReplicaError, SourceBusyError, StorageError, StorageFullError
from replica.primary.cycle import sync_machine
from replica.primary.spec import DiskSpec, MachineSpec, SenderSpec
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.store import Policy, ReplicaReader, restore_point
from tests.crash.crash_states import CrashModel
from tests.crash.explorer import CrashState, repeatable, violates
from tests.crash.histories import CHANGING, MACHINE, STORE, changing_world, machine_world, store_world
from tests.crash.memory_disk import Content, MemoryDisk, walk
from tests.crash.worlds import STORAGE, TLS, MachineWorld, Promises, StoreWorld

CHANGES = {"create", "write", "truncate", "punch", "sync", "sync-directory", "mkdir", "symlink", "link", "rmdir",
           "unlink", "rename"}  # fmt: skip
NEEDS_SPACE = {"create", "write", "mkdir", "symlink", "link", "rename", "sync"}
Fault = Callable[[int, str, str], int | None]


def fail(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def once(due: int, number: int) -> Fault:
    """Call `due` fails."""

    def fault(call: int, _name: str, path: str) -> int | None:
        if call == due:
            raise fail(number, path)
        return None

    return fault


def read_only_from(due: int) -> Fault:
    """From call `due` on nothing can be changed."""

    def fault(call: int, name: str, path: str) -> int | None:
        if call >= due and name in CHANGES:
            raise fail(errno.EROFS, path)
        return None

    return fault


@functools.cache
def before() -> MachineWorld:
    """Two points, and the third one is due."""
    world = machine_world()
    with repeatable(0):
        for _, step in MACHINE[:2]:
            step(world)
        world.close()
    return world


def start() -> MachineWorld:
    world = before()
    again = world.after_crash({host: disk.tree() for host, disk in world.disks.items()}, world.promises)
    again.write("os", 5_000, b"new" * 3_000)
    again.write("data", 0, bytes(9_000))
    again.show()
    assert again.receiver
    return again


def calls_of(host: str) -> list[tuple[int, str]]:
    """(number, name) of every call that a sync makes on a host's disk."""
    world, calls = start(), []
    world.disks[host].fault = lambda number, name, _path: calls.append((number, name))
    with repeatable(1):
        world.sync()
    return calls


def try_fault(host: str, fault: Fault) -> None:
    world = start()
    models = {name: CrashModel(disk.tree()) for name, disk in world.disks.items()}
    for name, disk in world.disks.items():
        disk.listener = models[name].apply
    world.disks[host].fault = fault
    with repeatable(1):
        try:
            world.sync()
        except (StorageError, ImageError, SourceBusyError):
            pass
        except DamageError as error:
            pytest.fail(f"a failing disk is no damage: {error}")
        world.disks[host].fault = None
        world.next_sync()  # by itself, in the same processes
        world.check_points()
        lost = {name: model.state((0,) * len(model.pending)) for name, model in models.items()}
        promises = replace(world.promises, receipts={})  # one whose name's sync failed is issued again
        world.close()
    broken = violates(world, CrashState(0, host, (), lost, promises))
    assert broken is None, f"after a power cut: {broken}"
    for disk in world.disks.values():
        disk.listener = None
    world._receiver = None
    with repeatable(2):
        world.next_sync()
    world.check_leaks()


PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("host", ["sender", "receiver"])
def test_any_call_fails_once(host: str, part: int) -> None:
    for number, name in calls_of(host)[part::PARTS]:
        try:
            try_fault(host, once(number, errno.EIO))
            if name in NEEDS_SPACE:
                try_fault(host, once(number, errno.ENOSPC))
        except BaseException as error:
            error.add_note(f"call {number}, {name}, on the {host}'s disk")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("host", ["sender", "receiver"])
def test_the_file_system_becomes_read_only(host: str) -> None:
    for number, name in calls_of(host):
        if name in CHANGES:
            try:
                try_fault(host, read_only_from(number))
            except BaseException as error:
                error.add_note(f"from call {number}, {name}, on the {host}'s disk")
                raise


ROTATION = next(number for number, (name, _) in enumerate(STORE) if name == "drop and compose")


@functools.cache
def before_rotation() -> tuple[StoreWorld, Promises]:
    """All points, and what a rotation leaves of them."""
    world = store_world()
    with repeatable(0):
        for _, step in STORE[:ROTATION]:
            step(world)
        world.close()
        after = world.after_crash({"receiver": world.disks["receiver"].tree()}, world.promises)
        STORE[ROTATION][1](after)
        after.close()
    return world, after.promises


def rotating() -> tuple[StoreWorld, CrashModel]:
    world, promises = before_rotation()
    again = world.after_crash({"receiver": world.disks["receiver"].tree()}, promises)
    again.recover()
    model = CrashModel(again.disks["receiver"].tree())
    again.disks["receiver"].listener = model.apply
    return again, model


def try_rotation(fault: Fault) -> None:
    world, model = rotating()
    policy = Policy(keep_last=3, hourly=0)
    world.disks["receiver"].fault = fault
    with repeatable(1):
        for rotate in (world.store.rotate, world.store.thin):
            with suppress(StorageError):
                rotate(policy, at_once=True)
        world.disks["receiver"].fault = None
        world.check_points()
        world.store.rotate(policy, at_once=True)
        world.store.thin(policy, at_once=True)
        world.store.rotate(policy, at_once=True)
    world.check_points()
    lost = {"receiver": model.state((0,) * len(model.pending))}
    broken = violates(world, CrashState(0, "receiver", (), lost, world.promises))
    # A removal that was not synced may come back: an inverse that nothing reaches is shown, and never just removed.
    back = ("left over in points", "lead nowhere", "point 1 is listed as not restorable")
    assert broken is None or any(words in broken for words in back), f"after a power cut: {broken}"


@pytest.mark.slow
def test_a_rotation_fails_anywhere() -> None:
    world, _ = rotating()
    first, calls = world.disks["receiver"].calls, []
    world.disks["receiver"].fault = lambda number, name, _path: calls.append((number - first, name))
    with repeatable(1):
        STORE[ROTATION][1](world)
    for number, name in calls:
        for kind in (once(first + number, errno.EIO), read_only_from(first + number)):
            if name in CHANGES or kind.__qualname__.startswith("once"):
                try:
                    try_rotation(kind)
                except BaseException as error:
                    error.add_note(f"{kind.__qualname__} at call {number}, {name}")
                    raise


OUT = Path("/nowhere/out")


@functools.cache
def with_files() -> MachineWorld:
    """A machine with two disks and a file of its own."""
    world = changing_world()
    with repeatable(0):
        for _, step in CHANGING[:2]:
            step(world)
        world.close()
    return world


def restore(disk: MemoryDisk, fault: Fault | None) -> set[str]:
    """The newest point onto another disk, which fails; the names that are there then."""
    world, fs = with_files(), FileSystem(disk)
    directory = world.directory()
    assert directory is not None
    with ReplicaReader(world.receiver_fs(), directory).open_point() as point:
        disk.fault = fault
        try:
            restore_point(fs, point, OUT, "raw")
        finally:
            disk.fault = None
    return {name for name, _ in walk(disk.tree())}


def test_a_restore_fails_anywhere() -> None:
    """Until the first name is given nothing is left of it, and then no half of a file; the next one tidies up."""
    calls: list[str] = []
    whole = restore(MemoryDisk(), lambda _number, name, _path: calls.append(name))
    first_name = next(number for number, name in enumerate(calls) if name in ("link", "rename"))
    for number, name in enumerate(calls):
        for error in (errno.EIO, errno.ENOSPC):
            disk = MemoryDisk()
            started = disk.calls
            try:
                left = restore(disk, once(started + number, error))
            except StorageError:
                left = {name for name, _ in walk(disk.tree())}
                if number < first_name:
                    assert str(OUT) not in left, f"call {number}, {name}: {left}"
                    left = restore(disk, None)
            if number < first_name:
                assert left == whole, f"call {number}, {name}"
            assert not [name for name in left if "partial" in name], f"call {number}, {name}: {left}"


@pytest.mark.parametrize("host", ["sender", "receiver"])
def test_a_failed_sync_may_take_what_is_visible_as_well(host: str) -> None:
    """As on file systems that drop the pages: the content is again what is on the disk."""
    for number, name in calls_of(host):
        if name == "sync":
            world = start()
            model = CrashModel(world.disks[host].tree())
            world.disks[host].listener = model.apply
            world.disks[host].after_failed_sync = lambda inode, model=model: model.durable.get(inode, Content())
            world.disks[host].fault = once(number, errno.EIO)
            with repeatable(1):
                with suppress(StorageError):
                    world.sync()
                world.disks[host].fault = None
                world.next_sync()
            world.check_points()


def test_short_reads_and_writes_are_no_trouble() -> None:
    world = machine_world()
    for disk in world.disks.values():
        disk.fault = lambda number, name, _path: 1 + number % 700 if name in ("read", "write") else None
    with repeatable(0):
        for _, step in MACHINE:
            step(world)
    world.check_points()
    world.check_leaks()


def test_full_is_said_to_be_full() -> None:
    world = start()
    world.disks["receiver"].fault = lambda _n, name, path: (_ for _ in ()).throw(fail(errno.ENOSPC, path)) if (
        name == "write" and "/head/" in path
    ) else None  # fmt: skip
    with pytest.raises(StorageFullError, match="head"):
        world.sync()


def test_other_machines_go_on() -> None:
    """Two machines at one site; everything in one replica's directory fails at some step of its commit."""
    receiver, sender = MemoryDisk(), MemoryDisk()
    fs, root = FileSystem(sender), Path("/nowhere/primary")
    FileSystem(receiver).make_directory(STORAGE)
    fs.make_directory(root)
    storages = {"tier1": StorageSpec(name="tier1", path=STORAGE, head="raw")}
    allow = [AllowSpec(primary="hv-*", storage="tier1", trust_group="prod")]
    policy = Policy(keep_last=1000)
    spec = SenderSpec("hv-1", root / "state", root / "keys", TLS)
    machines = [
        MachineSpec(name, "https://dr", (DiskSpec("os", root / f"{name}.raw", "raw"),)) for name in ("ill", "well")
    ]
    counter = iter(range(1, 1 << 20))

    def sync(machine: MachineSpec) -> Any:
        page = next(counter).to_bytes(4096, "little")
        sender.guest_write(machine.disks[0].image, Content(20_000, {0: page, 3: page}))
        return sync_machine(fs, spec, machine, site.session("hv-1"), retry_seconds=0.5)

    with Site(FileSystem(receiver), SiteSpec("127.0.0.1", 0, TLS, storages, allow, policy)) as site:
        ill, well = (sync(machine) for machine in machines)
        directory = str(STORAGE / str(ill.replica_id))
        for wanted in ("write", "sync", "rename", "sync-directory", "create", "read"):
            for skipped in (0, 2, 5, 9):
                left = [skipped]

                def fault(_n: int, name: str, path: str, wanted: str = wanted, left: list[int] = left) -> int | None:
                    if path.startswith(directory) and name == wanted:
                        left[0] -= 1
                        if left[0] < 0:
                            raise fail(errno.EIO, path)
                    return None

                receiver.fault = fault
                with suppress(ReplicaError):
                    sync(machines[0])
                point = sync(machines[1]).point
                assert point == well.point + 1
                well = sync(machines[1])
                receiver.fault = None
                ill = sync(machines[0])
                assert ill.point > 1
