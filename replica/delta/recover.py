"""Recovering a rotten leaf: what it held, from what is left of it and what the source holds now.

Of a rotten leaf only its digest is sure. The source may have changed some of its
grains meanwhile, and the rot is in some others: then neither copy is what the leaf
held, but each of its grains is still good on one of the two sides. A mixture of both
whose digest is the leaf's *is* the leaf, whoever sent what. So every mixture is tried
where there are few: with the default of four grains there are sixteen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from replica.merkle import leaf_digests

MAX_DIFFERING_GRAINS = 8
"""At most 256 mixtures are hashed: about a millisecond."""

Leaf = npt.NDArray[np.uint8]
"""u8[leaf_bytes], zeros behind the disk's end."""


def mixtures(own: Leaf, sent: Leaf, grain_bytes: int) -> Iterator[Leaf]:
    """Every leaf whose grains are each `own`'s or `sent`'s: both as they are, then, if they are few, the others."""
    yield own
    yield sent
    mine, theirs = own.reshape(-1, grain_bytes), sent.reshape(-1, grain_bytes)
    differing = np.flatnonzero((mine != theirs).any(axis=1))
    if len(differing) > MAX_DIFFERING_GRAINS:
        return
    for count in range(1, len(differing)):
        for chosen in itertools.combinations(differing.tolist(), count):
            mixed = mine.copy()
            mixed[list(chosen)] = theirs[list(chosen)]
            yield mixed.reshape(-1)


def recover(own: Leaf, sent: Leaf, grain_bytes: int, number: int, digest: bytes) -> Leaf | None:
    """The mixture whose digest as leaf `number` is `digest`; None if there is none."""
    return next((leaf for leaf in mixtures(own, sent, grain_bytes) if digest_of(leaf, number) == digest), None)


def digest_of(leaf: Leaf, number: int) -> bytes:
    return bytes(leaf_digests(leaf.data, number, len(leaf))[0])
