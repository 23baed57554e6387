"""A consumer of one queue or stream, on a channel of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from aio_pika.abc import AbstractChannel

from fluffle_common.errors import LinkLost
from fluffle_common.protocol.topology import lock_of
from fluffle_common.transport.base import Delivery
from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.connection import Connection
from fluffle_common.transport.rabbitmq.delivery import AmqpDelivery, Arrivals
from fluffle_common.transport.rabbitmq.errors import as_ours
from fluffle_common.transport.rabbitmq.lifetime import Lifetime

_CLOSE_TIMEOUT_S = 2.0
# How many entries of a stream are prefetched.
STREAM_PREFETCH = 500
_STREAM_ACK_EVERY = 100
# How long to wait for an entry before a stream counts as empty.
_EMPTY_S = 0.5


class Consumer:
    """A consumer; call ``begin``, then iterate over its deliveries or ask for the ``newest``.

    Args:
        queue: the name of the queue or stream.
        connection: the consuming connection of the link.
        lifetime: the lifetime of the link.
    """

    def __init__(self, queue: str, connection: Connection, lifetime: Lifetime) -> None:
        self._queue, self._connection, self._lifetime = queue, connection, lifetime
        self._arrived = Arrivals()
        self._channel: AbstractChannel
        self._contents: ContentChannel
        self._tag = ""

    async def begin(
        self,
        prefetch: int,
        *,
        exclusive: bool = False,
        replicated: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> Consumer:
        """Start consuming; ``replicated`` marks a quorum queue."""
        with self._lifetime.asking("read"):
            channel = self._connection.channel(publisher_confirms=False)
            # A refusal closes the channel, which must not end the link. The link therefore watches
            # the channel only once consuming has started.
            await channel.initialize()
            await channel.set_qos(prefetch_count=prefetch)
            underlay = await channel.get_underlay_channel()
            if exclusive and replicated:
                # Quorum queues accept any number of exclusive consumers. An exclusive queue serves
                # as a lock, which is released when this connection or its node goes.
                with self._lifetime.asking("configure"):
                    await underlay.queue_declare(
                        lock_of(self._queue), exclusive=True, arguments={"x-queue-type": "classic"}
                    )
            contents = await self._connection.contents(channel, self._arrived.put, prefetch)
            begun = await underlay.basic_consume(
                self._queue, _nothing, exclusive=exclusive, arguments=arguments
            )
        channel.close_callbacks.add(self._lifetime.lose)
        underlay.on_consumer_cancel_callbacks.add(self._cancelled)  # the queue was deleted
        self._channel, self._contents, self._tag = channel, contents, str(begun.consumer_tag)
        self._lifetime.at_end.add(self._over)
        return self

    async def deliveries(self) -> AsyncGenerator[AmqpDelivery]:
        """Yield deliveries until the link is lost or the iterator is closed."""
        arrived = self._arrived
        try:
            while True:
                self._lifetime.check()
                if not arrived.there:
                    await arrived.some()
                content = arrived.there.popleft()
                if content is not None:
                    self._lifetime.check()
                    yield AmqpDelivery(content, self._queue, self._contents)
        finally:
            await self._end()

    async def settled(self) -> AsyncGenerator[Delivery]:
        """Yield deliveries that are already acknowledged."""
        async with contextlib.aclosing(self.deliveries()) as deliveries:
            async for delivery in deliveries:
                delivery.ack()
                yield delivery

    async def entries(self) -> AsyncGenerator[Delivery]:
        """Yield the entries of a stream, acknowledged in batches to keep the broker sending."""
        count = 0
        async with contextlib.aclosing(self.deliveries()) as deliveries:
            async for entry in deliveries:
                count += 1
                if count % _STREAM_ACK_EVERY:
                    entry.disown()
                else:
                    entry.ack(all_before=True)
                yield entry

    async def newest(self) -> Delivery | None:
        """Return the last entry of a stream that is read from its last chunk."""
        arrived = self._arrived
        found: AmqpDelivery | None = None
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + _EMPTY_S
        try:
            while True:
                with as_ours():  # a round trip: all that was sent before has arrived
                    await self._channel.set_qos(prefetch_count=STREAM_PREFETCH)
                self._lifetime.check()
                if not arrived.there:
                    if found is not None or loop.time() >= gives_up_at:
                        return found
                    await asyncio.sleep(_EMPTY_S / 10)
                while arrived.there:
                    content = arrived.there.popleft()
                    if content is not None:
                        found = AmqpDelivery(content, self._queue, self._contents)
                        found.ack()
        finally:
            await self._end()

    def _over(self) -> None:
        self._arrived.put(None)  # wakes the reader
        self._contents.lose(self._lifetime.error())

    def _cancelled(self, *_: Any) -> None:
        self._lifetime.give_up("a queue we read from was deleted")

    async def _end(self) -> None:
        self._lifetime.at_end.discard(self._over)
        self._contents.lose(LinkLost("the consumer was closed"))
        if not self._lifetime.over.is_set():
            self._channel.close_callbacks.discard(self._lifetime.lose)
            with contextlib.suppress(LinkLost, TimeoutError), as_ours():
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    # RabbitMQ 3.10 keeps counting a stream consumer if only its channel closes.
                    await (await self._channel.get_underlay_channel()).basic_cancel(self._tag)
                    await self._channel.close()


async def _nothing(_: Any) -> None:
    """Stand in for the consumer callback, which is never called: messages bypass aiormq."""
