"""A consumer of one queue or stream, on a channel of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import aiormq.exceptions
from aio_pika.abc import AbstractChannel

from fluffle_common.errors import LinkLost
from fluffle_common.protocol.topology import locks_of
from fluffle_common.transport.base import Delivery
from fluffle_common.transport.rabbitmq.channel import Content, ContentChannel
from fluffle_common.transport.rabbitmq.connection import Connection
from fluffle_common.transport.rabbitmq.delivery import AmqpDelivery
from fluffle_common.transport.rabbitmq.errors import map_exceptions
from fluffle_common.transport.rabbitmq.lifetime import Lifetime

_CLOSE_TIMEOUT_S = 2.0
STREAM_PREFETCH = 500  # entries
# How long to wait for an entry before a stream counts as empty.
_EMPTY_S = 0.5


class Consumer:
    """A consumer; call ``start``, then iterate over its deliveries or ask for the ``newest``."""

    def __init__(self, queue: str, connection: Connection, lifetime: Lifetime) -> None:
        self._queue_name, self._connection, self._lifetime = queue, connection, lifetime
        self._received = asyncio.Queue[Content | None]()  # ends with None when the link is lost
        self._channel: AbstractChannel
        self._content_channel: ContentChannel
        self._tag = ""

    async def start(
        self,
        prefetch: int,
        *,
        exclusive: bool = False,
        replicated: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> Consumer:
        """Start consuming; ``replicated`` marks a quorum queue."""
        # A refusal closes the channel, which must not end the link. The link therefore watches the
        # channel only once consuming has started.
        with self._lifetime.requesting("read"):
            self._channel = self._connection.channel(publisher_confirms=False)
            try:
                await self._channel.initialize()
                await self._channel.set_qos(prefetch_count=prefetch)
                underlay = await self._channel.get_underlay_channel()
                if exclusive and replicated:
                    await self._lock()
                self._content_channel = await self._connection.content_channel(
                    self._channel, self._received.put_nowait, prefetch
                )
                underlay.on_consumer_cancel_callbacks.add(self._on_cancel)
                consume_ok = await underlay.basic_consume(
                    self._queue_name, _unused_callback, exclusive=exclusive, arguments=arguments
                )
            except BaseException:  # else it would hold messages that nobody reads
                await asyncio.shield(self._close_channel())
                raise
        self._channel.close_callbacks.add(self._lifetime.lose)
        if self._channel.is_closed:  # since the answer to our request
            self._lifetime.give_up("the broker closed the channel of a consumer")
        self._tag = str(consume_ok.consumer_tag)
        self._lifetime.end_callbacks.add(self._on_link_end)
        return self

    async def _lock(self) -> None:
        """Declare an exclusive queue as a lock, which is released when this connection goes.

        Quorum queues accept any number of exclusive consumers. RabbitMQ 4.3 keeps the lock of a
        failed node, so there is a second one. Whoever has one checks that nobody has the other.
        """
        with self._lifetime.requesting("configure"):
            mine, other = locks_of(self._queue_name)
            try:
                await self._declare_lock(mine)
            except aiormq.exceptions.ChannelLockedResource:
                mine, other = other, mine
                await self._declare_lock(mine)
            # Nobody has it, or its node has failed, which RabbitMQ reports after 70 s. A connection
            # to that node that still lives would by then have waited too long for a confirmation.
            with contextlib.suppress(aiormq.exceptions.ChannelNotFoundEntity):
                await self._declare_lock(other, passive=True)

    async def _declare_lock(self, lock: str, *, passive: bool = False) -> None:
        """Declare or look up a lock, on a channel of its own, because a refusal closes it."""
        channel = self._connection.channel(publisher_confirms=False)
        await channel.initialize()
        try:
            underlay = await channel.get_underlay_channel()
            await underlay.queue_declare(
                lock, passive=passive, exclusive=True, arguments={"x-queue-type": "classic"}
            )
        finally:
            await channel.close()

    async def deliveries(self) -> AsyncGenerator[AmqpDelivery]:
        """Yield deliveries until the link is lost or the iterator is closed."""
        try:
            self._lifetime.check()
            while (content := await self._received.get()) is not None:
                self._lifetime.check()
                yield AmqpDelivery(content, self._queue_name)
            self._lifetime.check()  # raises, since the link is lost
        finally:
            await self._end()

    async def acked(self) -> AsyncGenerator[Delivery]:
        """Yield deliveries; acknowledge each to keep the broker sending."""
        async with contextlib.aclosing(self.deliveries()) as deliveries:
            async for delivery in deliveries:
                delivery.ack()
                yield delivery

    async def newest(self) -> Delivery | None:
        """Return the last entry of a stream that is read from its last chunk."""
        newest: AmqpDelivery | None = None
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + _EMPTY_S
        try:
            while True:
                with map_exceptions():  # a round trip: all that was sent before has arrived
                    await self._channel.set_qos(prefetch_count=STREAM_PREFETCH)
                self._lifetime.check()
                if self._received.empty():
                    if newest is not None or loop.time() >= gives_up_at:
                        return newest
                    await asyncio.sleep(_EMPTY_S / 10)
                while not self._received.empty():
                    content = self._received.get_nowait()
                    if content is not None:
                        newest = AmqpDelivery(content, self._queue_name)
                        newest.ack()
        finally:
            await self._end()

    def _on_link_end(self) -> None:
        self._received.put_nowait(None)
        self._content_channel.close(self._lifetime.error())

    def _on_cancel(self, *_: Any) -> None:
        # The broker gives no reason. The second one is RabbitMQ 4.3's, for quorum queues.
        self._lifetime.give_up(
            f"queue {self._queue_name} was deleted, or a message from it was not acknowledged "
            "within consumer_timeout"
        )

    async def _end(self) -> None:
        self._lifetime.end_callbacks.discard(self._on_link_end)
        self._content_channel.close(LinkLost("the consumer was closed"))
        if not self._lifetime.ended.is_set():
            self._channel.close_callbacks.discard(self._lifetime.lose)
            await asyncio.shield(self._close_channel())

    async def _close_channel(self) -> None:
        with contextlib.suppress(LinkLost, TimeoutError), map_exceptions():
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                if self._tag:
                    # RabbitMQ 3.10 keeps counting a stream consumer if only its channel closes.
                    await (await self._channel.get_underlay_channel()).basic_cancel(self._tag)
                await self._channel.close()


async def _unused_callback(_: Any) -> None:
    """Stand in for the consumer callback, which is never called: messages bypass aiormq."""
