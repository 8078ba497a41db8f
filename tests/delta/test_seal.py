"""Keys, salts and nonces: who can open what, and that no (key, nonce) pair is used twice."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from replica.delta import DataKey, DeltaSealer, MemoryKeys, Segment, decode_header, rows_of
from replica.delta.seal import Kind, Opener, Sealer, derive
from replica.errors import DamageError, KeyMissingError
from replica.model import DeltaId, Epoch, KeyId, ReplicaId, random_id
from tests.delta.segment_reference import Reference

KEY = DataKey.generate()
REPLICA, DELTA, EPOCH = ReplicaId(random_id()), DeltaId(random_id()), Epoch(3, random_id())


def test_the_repr_of_a_key_keeps_its_secret() -> None:
    assert KEY.secret.hex() not in repr(KEY)
    assert repr(KEY.secret) not in repr(KEY)
    assert repr(KEY.secret) not in f"{KEY}"


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32"):
        DataKey(KeyId(random_id()), b"short")


def test_every_part_of_the_identity_makes_another_key() -> None:
    salt = os.urandom(32)
    base = (KEY, salt, REPLICA, DELTA, EPOCH)
    others = [
        (DataKey.generate(), salt, REPLICA, DELTA, EPOCH),
        (KEY, os.urandom(32), REPLICA, DELTA, EPOCH),
        (KEY, salt, ReplicaId(random_id()), DELTA, EPOCH),
        (KEY, salt, REPLICA, DeltaId(random_id()), EPOCH),
        (KEY, salt, REPLICA, DELTA, Epoch(4, EPOCH.holder)),
        (KEY, salt, REPLICA, DELTA, Epoch(3, random_id())),
    ]
    derived = {derive(*base), *(derive(*other) for other in others)}
    assert len({key for key, _ in derived}) == len({commitment for _, commitment in derived}) == 7


def test_every_sealer_draws_its_own_salt() -> None:
    salts = {Sealer(KEY, REPLICA, DELTA, EPOCH).header.salt for _ in range(100)}
    assert len(salts) == 100


def test_the_commitment_is_checked_first() -> None:
    header = Sealer(KEY, REPLICA, DELTA, EPOCH).header
    other = DataKey(KEY.id, os.urandom(32))
    with pytest.raises(KeyMissingError, match="was not sealed with"):
        Opener(header, MemoryKeys(other))
    with pytest.raises(KeyMissingError, match=str(KEY.id)):
        Opener(header, MemoryKeys())


@pytest.mark.parametrize(
    "change", [{"kind": Kind.TABLE}, {"segment": 5}, {"chunk": 5}, {"raw_bytes": 8}, {"flags": 1}], ids=str
)
def test_a_seal_holds_at_one_place_only(change: dict[str, Any]) -> None:
    by = Sealer(KEY, REPLICA, DELTA, EPOCH)
    place = {"kind": Kind.CHUNK, "segment": 1, "chunk": 2, "raw_bytes": 7, "flags": 0}
    sealed = by.seal(data=b"content", **place)  # type: ignore[arg-type]
    opener = Opener(by.header, MemoryKeys(KEY))
    assert opener.open(sealed=sealed, **place) == b"content"  # type: ignore[arg-type]
    with pytest.raises(DamageError):
        opener.open(sealed=sealed, **(place | change))  # type: ignore[arg-type]


def test_a_changed_header_opens_nothing() -> None:
    """Also where the change does not enter the key derivation."""
    by = Sealer(KEY, REPLICA, DELTA, EPOCH)
    sealed = by.seal(Kind.MANIFEST, 0, 0, b"content", 7)
    other = DataKey(KeyId(random_id()), KEY.secret)
    header = type(by.header)(**(vars(by.header) | {"key_id": other.id}))
    with pytest.raises(DamageError, match="manifest"):
        Opener(header, MemoryKeys(other)).open(Kind.MANIFEST, 0, 0, sealed, 7)


def test_no_nonce_repeats_over_many_attempts() -> None:
    """Deltas sealed again and again, some given up half way, from several threads. Opening proves the nonces."""
    used: list[tuple[bytes, tuple[int, int, int]]] = []
    segment = Segment(0, rows_of([(0, 40, 1)]), os.urandom(40 * 4096))
    for attempt in range(200):
        sealer = DeltaSealer(KEY, REPLICA, DELTA, EPOCH)
        with ThreadPoolExecutor(4) as pool:
            sealed = list(pool.map(lambda _, by=sealer: by.seal(segment), range(attempt % 5)))
        reference = Reference.of(decode_header(sealer.header), KEY)
        for number, blob in ((one.number, one.blob) for one in sealed):
            _, chunks = reference.open_segment(number, blob)
            used += [(reference.key, (2, number, 0)), *((reference.key, (3, number, i)) for i in range(len(chunks)))]
    assert len(used) > 1000
    assert len(set(used)) == len(used)


def test_a_number_is_sealed_once_in_any_order() -> None:
    by = Sealer(KEY, REPLICA, DELTA, EPOCH)
    for number in (3, 0, 1, 7, 2):
        by.claim_segment(number)
    for number in (0, 1, 2, 3, 7):
        with pytest.raises(AssertionError):
            by.claim_segment(number)
    by.claim_manifest()
    with pytest.raises(AssertionError):
        by.claim_manifest()
