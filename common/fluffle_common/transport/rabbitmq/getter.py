"""Single messages from queues that belong to someone else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fluffle_common.debug_loggers import logger
from fluffle_common.errors import LinkLost
from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.connection import Connection, close
from fluffle_common.transport.rabbitmq.delivery import AmqpDelivery
from fluffle_common.transport.rabbitmq.errors import closing_error, map_exceptions
from fluffle_common.transport.rabbitmq.lifetime import Lifetime

_LOG = logger("transport.link")


class Getter:
    """Takes single messages over a connection of its own, which it opens when it is first needed.

    The owner of a queue may delete it, use it exclusively, or redeclare it as a stream. The broker
    then closes the channel that gets a message from it, and for a stream the whole connection.
    """

    def __init__(self, connect: Callable[[], Awaitable[Connection]], lifetime: Lifetime) -> None:
        self.connection: Connection | None = None
        self._connect, self._lifetime = connect, lifetime
        self._channel: ContentChannel | None = None
        self._opening = asyncio.Lock()
        lifetime.end_callbacks.add(self._end)

    async def get(self, queue: str) -> AmqpDelivery | None:
        """Take one message; return None if the queue is empty or the broker refuses."""
        try:
            channel = await self._open_channel()
            content = await channel.take(queue)
        except LinkLost as why:
            self._lifetime.check()
            _LOG.debug("cannot get from %s: %s", queue, why)
            return None
        return None if content is None else AmqpDelivery(content, queue)

    async def _open_channel(self) -> ContentChannel:
        async with self._opening:
            self._lifetime.check()
            if self._channel is not None:
                return self._channel
            if self.connection is None:
                self.connection = await self._open_connection()
            with map_exceptions():
                channel = self.connection.channel(publisher_confirms=False)
                await channel.initialize()
                content_channel = await self.connection.content_channel(channel)
                channel.close_callbacks.add(self._on_channel_closed)
            self._channel = content_channel
            return content_channel

    async def _open_connection(self) -> Connection:
        connection = await self._connect()
        if self._lifetime.ended.is_set():
            await close(connection)
        self._lifetime.check()
        connection.close_callbacks.add(self._on_connection_closed)
        return connection

    def _on_connection_closed(self, _: Any, why: BaseException | None = None) -> None:
        self.connection = None
        self._on_channel_closed(_, why)

    def _on_channel_closed(self, _: Any, why: BaseException | None = None) -> None:
        closed = LinkLost("the connection was closed")
        self._close_channel(closed if why is None else closing_error(why))

    def _end(self) -> None:
        self._close_channel(self._lifetime.error())

    def _close_channel(self, why: Exception) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close(why)
