"""How fast a point behind many inverses is read: `python -m bench.chain [--points 500] [--size-mib 1024]`.

Makes a store with that many points of 0.1 % random 4 KiB changes (seeded, a third of them compressible), restores the
newest and the oldest, each in a process of its own and with the store's files in the page cache, and reads single
grains at random at several depths. Prints the oldest's speed as a ratio to the newest's, and the reads as a ratio to
`pread` of the head's image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.workload import GRAIN, MIB, content, make_image
from replica.delta import DataKey, DeltaSealer, Packer, Segment, SegmentEntry
from replica.delta.extents import rows_of_grains
from replica.durable import FileSystem
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State, random_id
from replica.store import Identity, ReplicaReader, ReplicaStore, restore_point

FS = FileSystem()
READS = 2000


class Store:
    """Fills a store with points, the cheapest way: the image in memory, its Merkle tree kept up to date."""

    def __init__(self, directory: Path, image: bytearray) -> None:
        self.image = image
        self._disk = Disk(DiskId(random_id()), "os", len(image))
        self._key, self._replica = DataKey.generate(), ReplicaId(random_id())
        self._epoch = Epoch(1, random_id())
        self._nodes = MemoryNodes()
        identity = Identity(self._replica, "web-1", "hv-1", "bench", "raw", 0)
        self._store = ReplicaStore.create(FS, directory, identity, self._key, self._epoch)
        self.directory = self._store.directory

    def commit(self, grains: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        """A point in which these grains are new."""
        view = np.frombuffer(self.image, np.uint8).reshape(-1, GRAIN)
        leaf = self._disk.leaf_bytes
        update = MerkleTree(self._nodes, leaf).update(write=True)
        for index in np.unique(grains // np.uint64(leaf // GRAIN)).tolist():
            update.put(index, leaf_digests(memoryview(self.image)[index * leaf : (index + 1) * leaf], index, leaf))
        root = update.root(self._disk.size_bytes)
        kept = grains[view[grains].any(axis=1)] if not self._store.head.disks else grains
        delta_id, head = DeltaId(random_id()), self._store.head
        state = DiskState(self._disk, root)
        result = State(self._replica, delta_id, head.point + 1, self._epoch, 0, Consistency.CRASH, (state,))
        sealer = DeltaSealer(self._key, self._replica, delta_id, self._epoch)
        self._store.begin(delta_id, head.delta_id, self._epoch, sealer.header)
        entries: list[SegmentEntry] = []
        offset = len(sealer.header)

        def add(segment: Segment) -> None:
            nonlocal offset
            sealed = sealer.seal(segment)
            self._store.receive(delta_id, sealed.number, offset, sealed.digest, bytes(sealed.blob))
            entries.append(SegmentEntry.of(sealed, offset))
            offset += len(sealed.blob)

        packer = Packer(add)
        for begin in range(0, len(kept), 1024):
            part = kept[begin : begin + 1024]
            packer.add(0, GRAIN, rows_of_grains(part, np.ones(len(part), np.bool_)), view[part].tobytes())
        packer.flush()
        self._store.finish(delta_id, sealer.tail(entries, head, result), offset)
        self._store.commit(delta_id)

    def close(self) -> None:
        self._store.close()


def fill(directory: Path, size: int, points: int) -> Path:
    make_image(directory / "image", size)
    store = Store(directory, bytearray((directory / "image").read_bytes()))
    (directory / "image").unlink()
    store.commit(np.arange(size // GRAIN, dtype=np.uint64))
    generator = np.random.default_rng(2)
    for number in range(points):
        chosen = np.sort(generator.choice(size // GRAIN, max(1, size // GRAIN // 1000), replace=False))
        for index, grain in enumerate(chosen.tolist()):
            kind = "text" if index % 3 == 0 else "random"
            store.image[grain * GRAIN : (grain + 1) * GRAIN] = content(kind, GRAIN, generator)
        store.commit(chosen.astype(np.uint64))
        if number % 50 == 49:
            print(f"{number + 1} points", file=sys.stderr)
    store.close()
    return store.directory


def peak_bytes() -> int:
    """Of this process alone (`ru_maxrss` would count what the parent had when it forked)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def restore(directory: Path, number: int, target: Path) -> dict[str, float]:
    """In a process of its own: seconds to open and to restore, peak memory."""
    began = time.perf_counter()
    with ReplicaReader(FS, directory).open_point(number) as point:
        opened = time.perf_counter()
        restore_point(FS, point, target, "raw")
    return {
        "open": opened - began,
        "restore": time.perf_counter() - opened,
        "peak": peak_bytes(),
    }


def reads(directory: Path, number: int) -> dict[str, float]:
    """Microseconds of a read of one random grain, at first and when the layers are known."""
    with ReplicaReader(FS, directory).open_point(number) as point:
        disk = point.disks[0]
        offsets = np.random.default_rng(3).integers(0, disk.size_bytes // GRAIN, READS).tolist()
        buffer, figures = bytearray(GRAIN), {}
        for name in ("first", "again"):
            began = time.perf_counter()
            for grain in offsets:
                point.read_into(disk.id, grain * GRAIN, buffer)
            figures[name] = (time.perf_counter() - began) / READS * 1e6
    with FS.open(next((directory / "head").glob("*-*.img"))) as file:
        began = time.perf_counter()
        for grain in offsets:
            file.read_into(grain * GRAIN, buffer)
        figures["raw"] = (time.perf_counter() - began) / READS * 1e6
    return figures


def child(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.chain", "--child", *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chain")
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--store", type=Path, help="measure this store, which an earlier run has left with --keep")
    parser.add_argument("--keep", action="store_true", help="leave the store there")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work, directory, number, *rest = options.child
        call = {"restore": restore, "reads": reads}[work]
        print(json.dumps(call(Path(directory), int(number), *map(Path, rest))))
        return
    work_directory = Path(tempfile.mkdtemp(prefix="replica-bench-", dir=options.dir))
    try:
        store = options.store or fill(work_directory, options.size_mib * MIB, options.points)
        measure(store, options.runs, work_directory)
    finally:
        if options.keep:
            print(f"kept in {work_directory}")
        else:
            shutil.rmtree(work_directory)


def measure(store: Path, runs: int, scratch: Path) -> None:
    began = time.perf_counter()
    numbers = [info.state.point for info in ReplicaReader(FS, store).points()]
    print(f"listing {len(numbers)} points: {time.perf_counter() - began:.3f} s")
    times: dict[int, float] = {}
    for number in (numbers[-1], numbers[0]):
        found = []
        for _ in range(runs + 1):
            target = scratch / "restored"
            os.sync()  # what another run wrote is no part of this one
            found.append(child("restore", store, number, target))
            shutil.rmtree(target)
        opened, seconds = (statistics.median(f[key] for f in found[1:]) for key in ("open", "restore"))
        times[number] = opened + seconds
        peak = max(f["peak"] for f in found) / MIB
        print(f"point {number}: opened in {opened:.3f} s, restored in {seconds:.2f} s, peak {peak:.0f} MiB")
    print(f"oldest / newest: {times[numbers[-1]] / times[numbers[0]]:.2f} x the speed")
    for depth in (1, 10, 100, 500):
        if depth < len(numbers):
            f = child("reads", store, numbers[-1] - depth)
            print(
                f"4 KiB at depth {depth}: first {f['first']:.0f} us, again {f['again']:.0f} us, pread {f['raw']:.1f} us"
            )


if __name__ == "__main__":
    main()
