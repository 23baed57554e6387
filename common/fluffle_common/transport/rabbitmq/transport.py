"""The transport to RabbitMQ: choosing a node of the URL and opening a link to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fluffle_common.concurrency import cancelled
from fluffle_common.errors import BrokerError, LinkLost, UsageError
from fluffle_common.transport.base import Link, Transport
from fluffle_common.transport.rabbitmq.connect_errors import (
    WrongNode,
    handshake_error,
    mechanism_error,
    probe_tls_error,
    tls_error,
)
from fluffle_common.transport.rabbitmq.connection import Connection, close
from fluffle_common.transport.rabbitmq.errors import error_text, is_connection_error
from fluffle_common.transport.rabbitmq.link import AmqpLink
from fluffle_common.transport.rabbitmq.urls import display_url, parse_urls, tls_context

if TYPE_CHECKING:
    from yarl import URL

# Over TLS, opening a connection takes six round trips, of up to 4 s over a bad line.
_CONNECT_TIMEOUT_S = 30.0
# Both sides send twice in this time. RabbitMQ closes a connection after two to three times this
# without a byte.
HEARTBEAT_S = 20
_TLS_ALERT = b"\x15\x03"  # how it begins


class AmqpTransport(Transport):
    """A transport to RabbitMQ, or to any reachable node of a cluster.

    Args:
        url: ``amqp://user:password@host:port/vhost`` or ``amqps://…``; for a cluster, one URL for
            each node, comma-separated. The first reachable node is used; after that, the node in
            use is tried first. A callable that returns such a text is called before each attempt,
            because a broker that has not started yet has no address yet.
        name: the name of the connections on RabbitMQ's management page.

    Raises:
        UsageError: if the URL is invalid.
    """

    def __init__(self, url: str | Callable[[], str], name: str) -> None:
        self._find_url = url if callable(url) else lambda: url
        self._urls = parse_urls(self._find_url())
        self._name = name
        self._was_connected = False
        self._current: URL | None = None

    @property
    def address(self) -> str:
        """See ``base.Transport``; the node in use, or all nodes while none is reachable."""
        return ", ".join(map(display_url, [self._current] if self._current else self._urls))

    async def open(self) -> Link:
        unreachable, unusable = [], []
        self._urls = parse_urls(self._find_url())
        for url in sorted(self._urls, key=lambda url: url != self._current):
            try:
                link = await self._open(url)
            except LinkLost as why:
                unreachable.append(
                    f"{display_url(url)}: {why}" if len(self._urls) > 1 else str(why)
                )
            except WrongNode as why:
                unusable.append(str(why))
            else:
                self._current, self._was_connected = url, True
                return link
        self._current = None
        if not unreachable:
            raise BrokerError("; ".join(unusable))
        raise LinkLost("; ".join(unreachable + unusable))

    async def _open(self, url: URL) -> Link:
        connections: list[Connection] = []
        try:
            for purpose in ("publish", "consume"):
                name = f"{self._name} ({purpose})"
                connections.append(await _connect(url, name, was_connected=self._was_connected))
            third = partial(_connect, url, f"{self._name} (fetch)", was_connected=True)
            user = url.user or "guest"
            return await AmqpLink(connections[0], connections[1], user, third).start()
        except BaseException:
            for connection in connections:
                await close(connection)
            raise


async def _connect(url: URL, name: str, *, was_connected: bool) -> Connection:
    """Open a connection; ``was_connected`` says that this process was connected before."""
    with_heartbeat = url.update_query(heartbeat=HEARTBEAT_S)
    try:
        context = tls_context(str(url))
    except UsageError as error:
        if was_connected:  # the files are being replaced, as when a certificate is renewed
            raise LinkLost(str(error)) from None
        raise
    connection = Connection(with_heartbeat, name, context)
    try:
        # Not aio_pika's own timeout: before Python 3.12, ``wait_for`` may lose a cancellation.
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await connection.connect()
    except asyncio.CancelledError:
        if cancelled():
            raise
        raise LinkLost("the connection was closed before it was open") from None
    except TimeoutError:
        raise LinkLost(f"no answer within {_CONNECT_TIMEOUT_S:.0f} s") from None
    except Exception as error:
        if (reason := connection.splitter.close_reason) is not None:
            raise handshake_error(*reason, url, was_connected=was_connected) from None
        if refusal := tls_error(error, url) or mechanism_error(error, url):
            raise refusal from None
        if not is_connection_error(error):
            raise
        if connection.splitter.first_bytes in (b"", _TLS_ALERT):
            refusal = await asyncio.to_thread(probe_tls_error, url, context)
            if refusal is not None:
                raise refusal from None
        raise LinkLost(error_text(error)) from None
    return connection
