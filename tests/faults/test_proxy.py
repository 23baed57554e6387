"""The proxy itself, and how a link handles the worst moments for a fault."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from unittest.mock import AsyncMock

import pytest
from yarl import URL

from fluffle_broker.node import node
from fluffle_common.errors import LinkLost
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Properties
from fluffle_common.transport.rabbitmq.connection import Connection
from fluffle_common.transport.rabbitmq.link import AmqpLink
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from tests.faults.proxy import Proxy, Side

PATIENCE_S = 60.0


class Pair:
    """A client's socket and the server's socket, connected through a proxy."""

    def __init__(self, proxy: Proxy, server: socket.socket) -> None:
        self.proxy = proxy
        self.client = socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S)
        self.server, _ = server.accept()
        self.server.settimeout(PATIENCE_S)

    def passes(self) -> bool:
        """Whether bytes pass in both directions."""
        self.client.sendall(b"there")
        self.server.sendall(b"back")
        return (self.server.recv(5), self.client.recv(4)) == (b"there", b"back")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        with Proxy(server.getsockname()[1]) as proxy:
            made = Pair(proxy, server)
            with made.client, made.server:
                yield made


def gone(one: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return one.recv(1) == b""
    return True


def test_it_forwards_both_ways_and_ends_both_sides(pair: Pair) -> None:
    assert pair.passes()
    assert pair.proxy.open_connections() == 1
    pair.client.close()
    assert gone(pair.server)


def test_cut_resets_both_sides(pair: Pair) -> None:
    assert pair.passes()
    assert pair.proxy.cut(1.0, random.Random(0)) == 1
    for one in (pair.client, pair.server):
        with pytest.raises(ConnectionResetError):
            one.recv(1)


def test_stall_holds_everything_back_for_a_while(pair: Pair) -> None:
    assert pair.passes()
    began = time.monotonic()
    assert pair.proxy.stall(1.0, 0.5, random.Random(0)) == 1
    pair.client.sendall(b"late")
    assert pair.server.recv(4) == b"late"
    assert time.monotonic() - began > 0.45
    assert pair.passes()


def test_some_connections_are_slow_for_a_while(pair: Pair) -> None:
    assert pair.passes()
    began = time.monotonic()
    assert pair.proxy.slow_some(1.0, 20_000, 0.4, random.Random(0)) == 1
    pair.client.sendall(bytes(1_000_000))  # 50 s at this rate
    left = 1_000_000
    while left:
        left -= len(pair.server.recv(left))
    assert 0.35 < time.monotonic() - began < 45
    assert pair.passes()


@pytest.mark.parametrize("side", ["client", "broker"])
def test_half_close_ends_only_one_side(pair: Pair, side: Side) -> None:
    assert pair.passes()
    ended, dark = (pair.client, pair.server) if side == "client" else (pair.server, pair.client)
    began = time.monotonic()
    assert pair.proxy.half_close(1.0, side, 0.6, random.Random(0)) == 1
    assert ended.recv(1) == b""
    ended.close()
    with contextlib.suppress(ConnectionError):  # it may be over already
        dark.sendall(b"anybody?")
    assert gone(dark)
    assert time.monotonic() - began > 0.55


def test_the_rate_limits_all_connections_together() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        with Proxy(server.getsockname()[1], rate=100_000) as proxy:
            pairs = [Pair(proxy, server) for _ in range(2)]
            began = time.monotonic()
            for pair in pairs:
                pair.client.sendall(bytes(20_000))
            for pair in pairs:
                left = 20_000
                while left:
                    left -= len(pair.server.recv(left))
            assert time.monotonic() - began > 0.35
            proxy.slow(None)
            assert all(pair.passes() for pair in pairs)
            for pair in pairs:
                pair.client.close()
                pair.server.close()


def test_the_client_is_reset_if_nothing_listens(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Proxy(port) as proxy, contextlib.suppress(ConnectionResetError):  # even immediately
        with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S) as one:
            assert gone(one)


@pytest.mark.rabbit
async def test_closing_a_link_does_not_cancel_its_publishers(
    broker_node: node.NodeInfo,
) -> None:
    """Regression: a worker ended as if interrupted when the broker died during its upload."""
    names = Topology(f"t{uuid.uuid4().hex[:8]}")
    with Proxy(broker_node.ports.amqp) as proxy:
        url = broker_node.url.replace(f":{broker_node.ports.amqp}", f":{proxy.port}")
        link = await AmqpTransport(url, "fault test").open()
        await link.declare(names.shared())
        proxy.stall(1.0, 30, random.Random(0))
        sending = asyncio.create_task(
            link.publish(b"x", Properties(), exchange="", keys=[names.rejected])
        )
        await asyncio.to_thread(threading.Event().wait, 0.2)  # published, not yet confirmed
        assert not sending.done()
        await link.close()
        with pytest.raises(LinkLost):
            await sending
        assert not sending.cancelled()


@pytest.mark.rabbit
async def test_a_connection_lost_before_its_channels_open_is_a_lost_link(
    broker_node: node.NodeInfo,
) -> None:
    """Regression: a worker ended with a traceback when the broker died at this moment."""
    url = URL(broker_node.url)
    first, second = (Connection(url, f"fault test {number}") for number in (1, 2))
    for connection in (first, second):
        await connection.connect(PATIENCE_S)
        await connection.close()
    with pytest.raises(LinkLost):
        await AmqpLink(first, second, "guest", connect=AsyncMock()).start()
