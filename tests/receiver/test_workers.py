"""Worker threads: nobody's work takes them all."""

from __future__ import annotations

import asyncio
import threading

import pytest

from replica.errors import BusyError
from replica.receiver import workers
from replica.receiver.workers import IDENTITY_SHARE, SHARE, Workers


def test_neither_a_replica_nor_an_identity_takes_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TURN_SECONDS", 0.1)
    go_on = threading.Event()

    async def main() -> None:
        pool = Workers(2 * IDENTITY_SHARE)
        hanging = [
            asyncio.create_task(pool.on("hv-1", replica, go_on.wait, 30))
            for replica in range(IDENTITY_SHARE)
            for _ in range(SHARE + 1)
        ]
        await asyncio.sleep(0.3)
        refused = [str(task.exception()) for task in hanging if task.done()]
        assert len(hanging) - len(refused) == IDENTITY_SHARE
        assert any("replica 0 is busy" in text for text in refused)
        assert any("8 requests of 'hv-1'" in text for text in refused)
        with pytest.raises(BusyError, match="requests of 'hv-1'"):
            await pool.on("hv-1", "another", str)
        assert await pool.on("hv-2", "another", str, 7) == "7"
        go_on.set()
        await asyncio.gather(*hanging, return_exceptions=True)
        assert await pool.on("hv-1", 0, str, 7) == "7"
        assert pool._turns == {}
        pool.close()

    asyncio.run(main())
