"""The listener by itself: at its end no connection is left, however far it had come."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from replica.receiver.listener import Listener
from replica.transport.tls import client_context, server_context
from tests.receiver.loopback import Pki


class ClosesTwice(asyncio.Protocol):
    """As a server does that answers an error and then is told to end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.close()
        self.transport.close()


def end_with(pki: Pki, meet: Callable[[Listener, socket.socket], Awaitable[None]]) -> None:
    """`meet` a client that has connected and said nothing; when it returns no connection may be left of any kind."""
    faults: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        listener = Listener("127.0.0.1", 0)
        listener.start(server_context(pki.files("dr-1", ("localhost", "127.0.0.1"))), ClosesTwice)
        with socket.create_connection(listener.address, 20) as client:
            while not len(listener):
                await asyncio.sleep(0)
            await meet(listener, client)
            assert len(listener) == 0

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(main())
        gc.collect()
    assert [str(warning.message) for warning in told] == []
    assert faults == []


@pytest.mark.parametrize("turns", range(6))
def test_a_handshake_is_given_up_wherever_it_is(pki: Pki, turns: int) -> None:
    async def meet(listener: Listener, client: socket.socket) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await listener.close()
        assert client.recv(1) == b""

    end_with(pki, meet)


def test_a_connection_that_was_closed_twice_is_cut_without_its_peer(pki: Pki) -> None:
    async def meet(listener: Listener, client: socket.socket) -> None:
        def speak() -> None:
            tls = client_context(pki.files("hv-1")).wrap_socket(client, server_hostname="localhost")
            tls.sendall(b"x")
            client.detach()
            kept.append(tls)

        kept: list[socket.socket] = []
        await asyncio.to_thread(speak)
        await asyncio.sleep(0.1)
        assert len(listener) == 1
        await listener.close()
        await listener.abort()
        with suppress(ConnectionError):
            while kept[0].recv(100):
                pass
        kept[0].close()

    end_with(pki, meet)
