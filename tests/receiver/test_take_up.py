"""A delta that had arrived whole when the receiver was killed is committed by its next start, over the real store."""

from __future__ import annotations

import time
from pathlib import Path

from replica.durable import FileSystem
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.transport.tls import TlsFiles
from tests.store.small_primary import SmallPrimary


def test_a_received_delta_is_committed_without_being_asked_for_again(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    store.close()

    spec = SiteSpec(
        "127.0.0.1", 0, TlsFiles(tmp_path, tmp_path, tmp_path), {"s": StorageSpec("s", tmp_path, "raw")},
        (AllowSpec("hv-*", "s", "prod"),),
    )  # fmt: skip
    with Site(fs, spec) as site:
        session = site.session("hv-1")
        deadline = time.monotonic() + 30
        while (info := session.replica(primary.replica_id)).applying is not None:
            assert info.applying == made.delta_id and time.monotonic() < deadline
            time.sleep(0.01)
        assert info.head == made.result
        assert info.receiving is None
