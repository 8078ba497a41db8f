"""Only a replica itself says that content is lost: from a sender it is refused, marked or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.delta import LOST, DeltaSealer, Segment, SegmentEntry, rows_of
from replica.durable import FileSystem
from replica.errors import DamageError
from replica.model import DeltaId, random_id
from tests.store.small_primary import Made, SmallPrimary


@pytest.mark.parametrize("says_so", [True, False])
def test_a_delta_with_lost_extents_is_refused(tmp_path: Path, says_so: bool) -> None:
    primary = SmallPrimary({"os": 1 << 20})
    store = primary.enrol(FileSystem(), tmp_path)
    primary.scribble()
    primary.sync(store)
    plain = primary.make()
    delta_id = DeltaId(random_id())
    sealer = DeltaSealer(primary.key, primary.replica_id, delta_id, primary.epoch)
    sealed = sealer.seal(Segment(0, rows_of([(3, 2, LOST)]), b""))
    import msgspec

    result = msgspec.structs.replace(plain.result, delta_id=delta_id)
    made = Made(delta_id, plain.base, result, sealer.header)
    made.segments = [(0, len(sealer.header), sealed.digest, bytes(sealed.blob))]
    made.tail = sealer.tail([SegmentEntry.of(sealed, len(sealer.header))], plain.base, result, lost=says_so)
    made.tail_offset = len(sealer.header) + len(sealed.blob)
    with pytest.raises(DamageError, match="lost"):
        primary.send(store, made)
        store.commit(delta_id)
    assert store.head == plain.base
    assert store.stopped is None
    primary.sync(store)
    store.close()
