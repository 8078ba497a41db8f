"""How `delta-v1.*` was made, once. Run it only to make a vector for a *new* version of the format:

    python -m tests.vectors.make_delta_v1 tests/vectors

The files it wrote are frozen: whatever the engine becomes, it opens them.
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path
from uuid import UUID

import msgspec

from replica.delta import MemoryDelta, diff
from replica.delta.head import MemoryHead
from replica.delta.keys import DataKey
from replica.model import DeltaId, Disk, DiskId, Epoch, KeyId, ReplicaId
from tests.laws.files import encode

KEY = DataKey(KeyId(UUID(int=0x1111)), bytes(range(32)))
REPLICA = ReplicaId(UUID(int=0x2222))
EPOCH = Epoch(7, UUID(int=0x3333))
OS = Disk(DiskId(UUID(int=0x4444)), "os", 600_000)
LOG = Disk(DiskId(UUID(int=0x5555)), "log disk", 70_001, grain_bytes=512, leaf_bytes=4096)
OLD = Disk(DiskId(UUID(int=0x6666)), "old", 4096)
NEW = Disk(DiskId(UUID(int=0x7777)), "new", 10_000, sector_bytes=4096)


def vector() -> MemoryDelta:
    """Every case in one file: changed, grown, removed and added disks, zeros, stored and compressed chunks."""
    generator = random.Random(20261122)
    noise, text = generator.randbytes(300_000), b"the quick brown fox " * 10_000
    before = {OS: noise + bytes(300_000), LOG: (text[:70_001]), OLD: noise[:4096]}
    after = {
        OS: text[:150_000] + bytes(100_000) + noise[:100_000] + bytes(150_000) + noise[:100_000],
        msgspec.structs.replace(LOG, size_bytes=90_001): text[:20_000] + b"\x01" * 10_000 + text[:60_001],
        NEW: bytes(8192) + noise[:1808],
    }
    ids = (DeltaId(UUID(int=0xAAAA)), DeltaId(UUID(int=0xBBBB)))
    heads = [
        MemoryHead.of(REPLICA, EPOCH, contents, point=41 + i, delta_id=ids[i])
        for i, contents in enumerate((before, after))
    ]
    return diff(*heads)


def describe(delta: MemoryDelta) -> dict[str, object]:
    """What whoever opens the file must find."""
    segments = [
        {"disk": s.disk, "extents": s.extents.tolist(), "payload_sha256": hashlib.sha256(s.payload).hexdigest()}
        for s in delta.segments()
    ]
    return {
        "key": {"id": str(KEY.id), "secret": KEY.secret.hex()},
        "delta_id": str(delta.delta_id),
        "base": delta.base,
        "result": delta.result,
        "segments": segments,
    }


if __name__ == "__main__":
    directory, delta = Path(sys.argv[1]), vector()
    with (directory / "delta-v1.rpldelta").open("xb") as file:
        file.write(encode(delta, order=[1, 0, *range(2, len(delta.parts))], key=KEY))
    document = msgspec.json.format(msgspec.json.encode(describe(delta)), indent=1)
    (directory / "delta-v1.json").write_bytes(document + b"\n")
