"""Single stages through the library: the scan of an image, and the receiver's apply of a delta."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.workload import change_random_grains
from replica import images
from replica.delta import DataKey, DeltaSealer, Packer, Segment, SegmentEntry, hole_rows, window_rows
from replica.durable import FileSystem
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State, random_id
from replica.store import Identity, ReplicaStore
from replica.tracking.fold import fold
from replica.tracking.hash import Gap, HashTracker
from replica.tracking.journal import Journal, JournalSummary, JournalWriter

FS = FileSystem()


class ScanBench:
    """Scans one image with a hash tracker; nothing is shipped."""

    def __init__(self, directory: Path, image: Path) -> None:
        self._directory = directory
        self._image = image
        self._disk = Disk(DiskId(random_id()), "os", image.stat().st_size)
        self._replica = ReplicaId(random_id())
        self._epoch = Epoch(1, random_id())
        self.head: State | None = None

    def cold(self) -> None:
        """With nothing known: every grain is new."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self.scan()

    def scan(self) -> bytes:
        """One pass; what it finds goes to a journal that is thrown away."""
        FS.make_directory(self._directory)
        tracker = HashTracker(FS, self._directory, self._disk, self.head)
        with images.open(self._image, "raw", fs=FS) as image, JournalWriter(FS, self._directory) as journal:
            scan = tracker.scan(image, journal, 0, fresh=not tracker.known)
            for _ in scan:
                pass
            return scan.root

    def remember(self) -> None:
        """Scan and fold: from here on the image is known."""
        tracker = HashTracker(FS, self._directory, self._disk, None)
        with images.open(self._image, "raw", fs=FS) as image, JournalWriter(FS, self._directory) as journal:
            scan = tracker.scan(image, journal, 0, fresh=True)
            for _ in scan:
                pass
            delta_id = DeltaId(random_id())
            disks = (DiskState(self._disk, scan.root),)
            state = State(self._replica, delta_id, 1, self._epoch, 0, Consistency.CRASH, disks)
            journal.finish(JournalSummary(State.empty(self._replica, self._epoch).delta_id, state, (True,)))
        with Journal(FS, self._directory / "pending") as pending:
            pending.accept()
            fold(FS, self._directory, pending)
            pending.remove()
        self.head = state


def stages(directory: Path, image: Path, runs: int) -> dict[str, tuple[float, int]]:
    """Median seconds and bytes of each stage alone. Changes the image: 1 % of its grains, several times."""
    FS.make_directory(directory)
    scan, size = ScanBench(directory / "scan", image), image.stat().st_size
    figures = {"scan, cold tracker": (_median(runs, scan.cold), size)}
    scan.remember()
    figures["scan, nothing changed"] = (_median(runs, scan.scan), size)
    change_random_grains(image, 0.01, seed=10)
    figures["scan, 1 % changed"] = (_median(runs, scan.scan), size)
    apply = ApplyBench(directory / "apply", image)
    figures["apply, first copy (raw)"] = apply.first()
    figures["apply, 1 % random 4 KiB (raw)"] = apply.change(runs)
    shutil.rmtree(directory)
    return figures


def _median(runs: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass
class _Sealed:
    header: bytes
    segments: list[tuple[int, int, bytes, bytes]]
    tail: bytes
    tail_offset: int
    result: State
    raw_bytes: int


class ApplyBench:
    """Commits deltas of one image into a store: seconds of `commit` alone, everything else is prepared."""

    def __init__(self, directory: Path, image: Path) -> None:
        self._image = image
        self._directory = directory
        self._scan = ScanBench(directory / "tracker", image)
        self._disk = self._scan._disk
        self._key = DataKey.generate()
        self._replica, self._epoch = self._scan._replica, self._scan._epoch
        identity = Identity(self._replica, "web-1", "hv-1", "bench", "raw", 0)
        FS.make_directory(directory)
        self._store = ReplicaStore.create(FS, directory, identity, self._key, self._epoch)
        self._head = self._store.head

    def first(self) -> tuple[float, int]:
        """Seconds and raw bytes of the first copy."""
        return self._commit(self._seal())

    def change(self, runs: int) -> tuple[float, int]:
        """The same for 1 % random grains: medians."""
        outcomes = []
        for run in range(runs):
            self._scan.remember()
            change_random_grains(self._image, 0.01, seed=100 + run)
            outcomes.append(self._commit(self._seal()))
        return statistics.median(seconds for seconds, _ in outcomes), outcomes[0][1]

    def _commit(self, sealed: _Sealed) -> tuple[float, int]:
        delta_id = sealed.result.delta_id
        self._store.begin(delta_id, self._head.delta_id, self._epoch, sealed.header)
        for number, offset, digest, blob in sealed.segments:
            self._store.receive(delta_id, number, offset, digest, blob)
        self._store.finish(delta_id, sealed.tail, sealed.tail_offset)
        began = time.perf_counter()
        self._head = self._store.commit(delta_id)
        return time.perf_counter() - began, sealed.raw_bytes

    def _seal(self) -> _Sealed:
        """The delta from the head to the image, in memory."""
        delta_id = DeltaId(random_id())
        sealer = DeltaSealer(self._key, self._replica, delta_id, self._epoch)
        segments: list[tuple[int, int, bytes, bytes]] = []
        entries: list[SegmentEntry] = []
        raw = 0

        def add(segment: Segment) -> None:
            nonlocal raw
            sealed = sealer.seal(segment)
            offset = segments[-1][1] + len(segments[-1][3]) if segments else len(sealer.header)
            segments.append((sealed.number, offset, sealed.digest, bytes(sealed.blob)))
            entries.append(
                SegmentEntry(
                    sealed.number, sealed.disk, offset, len(sealed.blob), sealed.first, sealed.last, sealed.digest
                )
            )
            raw += segment.raw_bytes

        root = self._pack(Packer(add))
        disks = (DiskState(self._disk, root),)
        result = State(self._replica, delta_id, self._head.point + 1, self._epoch, 0, Consistency.CRASH, disks)
        offset = segments[-1][1] + len(segments[-1][3]) if segments else len(sealer.header)
        return _Sealed(sealer.header, segments, sealer.tail(entries, self._head, result), offset, result, raw)

    def _pack(self, packer: Packer) -> bytes:
        base_grains = self._disk.count_grains if self._head.disks else 0
        directory = self._directory / "tracker"
        FS.make_directory(directory)
        tracker = HashTracker(FS, directory, self._disk, self._scan.head)
        with images.open(self._image, "raw", fs=FS) as image, JournalWriter(FS, directory) as journal:
            scan = tracker.scan(image, journal, 0, fresh=not tracker.known)
            for piece in scan:
                if isinstance(piece, Gap):
                    rows, payload = hole_rows(piece.first_grain, piece.stop_grain, base_grains), b""
                else:
                    rows, found = window_rows(
                        piece.first_grain, piece.buffer.data, self._disk.grain_bytes, piece.dirty, piece.zero,
                        base_grains,
                    )  # fmt: skip
                    payload = found.tobytes()
                packer.add(0, self._disk.grain_bytes, rows, payload)
            packer.flush()
            return scan.root
