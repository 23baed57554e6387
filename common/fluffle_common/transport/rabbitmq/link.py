"""A link to RabbitMQ.

A link uses two connections, one for publishing and one for consuming, because a large message
delays everything behind it on the same socket, acknowledgements and heartbeats included. While a
large message is being published, urgent messages go out on the consuming connection, so that a long
upload does not make a worker look dead.

aio_pika's ``connect_robust`` is not used. It restores consumers, prefetch and queues silently, but
the layers above must know about a reconnection, since all unacknowledged messages come again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiormq.exceptions
from aio_pika.abc import AbstractChannel
from aiormq.abc import AbstractChannel as UnderlayChannel

from fluffle_common.debug_loggers import logger
from fluffle_common.errors import LinkLost
from fluffle_common.protocol.topology import Binding, Entity, Exchange, Queue
from fluffle_common.transport.base import (
    MAX_LISTED_KEYS,
    Body,
    Counts,
    Delivery,
    Link,
    Properties,
    QueueFull,
    Since,
    Unroutable,
)
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.confirms import ConfirmWatch
from fluffle_common.transport.rabbitmq.connection import Connection, close
from fluffle_common.transport.rabbitmq.consumer import STREAM_PREFETCH, Consumer
from fluffle_common.transport.rabbitmq.delivery import AmqpDelivery
from fluffle_common.transport.rabbitmq.errors import Right, map_declare_errors, map_exceptions
from fluffle_common.transport.rabbitmq.getter import Getter
from fluffle_common.transport.rabbitmq.lifetime import Lifetime

# Urgent messages use the other connection while more bytes than this are unconfirmed.
_LITTLE_BYTES = 16 * 2**10
# How many copies a tap prefetches; each may be a part of 4 MiB.
_TAP_PREFETCH = 16
_KEYS_SHOWN = 5  # of a message that the broker refused
# There is no such entity, or it is a queue that only the connection that declared it may use.
_OUT_OF_REACH = (aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelLockedResource)

_LOG = logger("transport.link")
_T = TypeVar("_T")


class AmqpLink(Link):
    """A link over two open connections; call ``start`` before anything else.

    ``connect`` opens a third connection, for messages that are taken from the queues of others.
    """

    def __init__(
        self,
        publishing: Connection,
        consuming: Connection,
        user: str,
        connect: Callable[[], Awaitable[Connection]],
    ) -> None:
        self.blocking = publishing.blocking
        self._connections = (publishing, consuming)
        self._user = user
        self._lifetime = Lifetime(user, lambda: consuming.splitter.close_reason)
        self._getter = Getter(connect, self._lifetime)
        self._quorum: set[str] = set()  # the quorum queues that were declared over this link
        self._requests: UnderlayChannel
        self._publish_channel: ContentChannel
        self._get_channel: ContentChannel  # urgent messages are published there too
        self._watches: list[ConfirmWatch] = []
        self._probe_channel: AbstractChannel | None = None
        self._probe_lock = asyncio.Lock()

    @property
    def incomplete_bytes(self) -> int:
        return self._connections[1].splitter.incomplete_bytes

    async def start(self) -> AmqpLink:
        """Open the channels."""
        for connection in self._connections:
            connection.close_callbacks.add(self._lifetime.lose)
        publishing, consuming = self._connections
        with map_exceptions(self._user):
            publish = publishing.channel(publisher_confirms=True)
            request = consuming.channel(publisher_confirms=True)
            for channel in (publish, request):
                await channel.initialize()
                channel.close_callbacks.add(self._lifetime.lose)
            self._publish_channel = await publishing.content_channel(publish)
            self._get_channel = await consuming.content_channel(request)
            self._requests = await request.get_underlay_channel()
        self._lifetime.end_callbacks.add(self._on_end)
        self._lifetime.check()
        # While a quorum queue elects a new leader, a channel can get into a state in which RabbitMQ
        # never confirms its messages again, or refuses all of them as if the queue were full. Only
        # a new link's channels help.
        self._watches = [
            ConfirmWatch(publishing, self._publish_channel, self._lifetime.give_up),
            ConfirmWatch(consuming, self._get_channel, self._lifetime.give_up),
        ]
        return self

    def _on_end(self) -> None:
        for watch in self._watches:
            watch.close()
        for channel in (self._publish_channel, self._get_channel):
            channel.close(self._lifetime.error())

    async def declare(self, entities: Iterable[Entity]) -> None:
        self._lifetime.check()
        for entity in entities:
            _LOG.debug("declaring %s", entity)
            right: Right = "bind" if isinstance(entity, Binding) else "configure"
            with map_declare_errors(), self._lifetime.requesting(right):
                await _finished(self._declare(entity))
            if isinstance(entity, Queue) and entity.arguments.get("x-queue-type") == "quorum":
                self._quorum.add(entity.name)

    async def _declare(self, entity: Entity) -> None:
        channel = self._requests
        match entity:
            case Exchange(name, kind, alternate):
                await channel.exchange_declare(
                    name,
                    exchange_type=kind,
                    durable=True,
                    arguments={"alternate-exchange": alternate} if alternate else None,
                )
            case Queue(name, _, arguments):
                await channel.queue_declare(name, durable=True, arguments={**arguments})
            case Binding(queue, exchange, key):
                await channel.queue_bind(queue, exchange, key)

    async def exists(self, exchange: str) -> bool:
        declare_ok = await self._request_or_none(
            lambda channel: channel.exchange_declare(exchange, passive=True)
        )
        return declare_ok is not None

    async def bind(self, bindings: Iterable[Binding]) -> bool:
        async def bind_all(channel: UnderlayChannel) -> bool:
            for binding in bindings:
                await channel.queue_bind(binding.queue, binding.exchange, binding.key)
            return True

        return await self._request_or_none(bind_all, "bind") is not None

    async def _request_or_none(
        self,
        ask: Callable[[UnderlayChannel], Awaitable[_T]],
        right: Right | None = None,
    ) -> _T | None:
        """Send a request that names an entity; return None if the entity is out of reach.

        The broker then closes the channel, so these requests have a channel of their own.
        """
        self._lifetime.check()
        return await _finished(self._probe(ask, right))

    async def _probe(
        self, ask: Callable[[UnderlayChannel], Awaitable[_T]], right: Right | None
    ) -> _T | None:
        async with self._probe_lock:
            with self._lifetime.requesting(right):
                channel, self._probe_channel = self._probe_channel, None
                if channel is None:
                    channel = self._connections[1].channel(publisher_confirms=False)
                    await channel.initialize()
                try:
                    answer = await ask(await channel.get_underlay_channel())
                except _OUT_OF_REACH:
                    return None
                self._probe_channel = channel
                return answer

    async def publish(
        self,
        body: Body,
        properties: Properties,
        *,
        exchange: str,
        keys: Sequence[str],
        urgent: bool = False,
    ) -> None:
        self._lifetime.check()
        first, *rest = keys
        headers: dict[str, frames.Value] = dict(properties.headers)
        if rest:
            header = "CC" if len(keys) <= MAX_LISTED_KEYS else "BCC"  # the broker removes BCC
            headers[header] = rest
        channel = self._choose_channel(urgent=urgent)
        head_on = partial(
            frames.publish,
            size=len(body),
            exchange=exchange,
            key=first,
            kind=properties.type,
            message_id=properties.message_id,
            user=self._user,
            headers=headers,
            durable=properties.durable,
        )
        head = head_on(channel.number)
        if len(head) > channel.frame_max and rest:
            send = partial(self.publish, body, properties, exchange=exchange, urgent=urgent)
            await _publish_in_halves(send, keys)
            return
        try:
            await channel.publish(head, properties.message_id, body)
        except QueueFull:
            if not self._quorum or not await self._takes(head_on, properties.message_id, body):
                listed = ", ".join(keys[:_KEYS_SHOWN]) + (", …" if keys[_KEYS_SHOWN:] else "")
                refused = f"the broker refused the {properties.type} for {listed}"
                raise QueueFull(refused) from None
            why = "the broker refused a message on one channel, but not on another"
            self._lifetime.give_up(why)  # see ``start``
            raise self._lifetime.error() from None

    async def _takes(self, head_on: Callable[[int], bytes], message_id: str, body: Body) -> bool:
        """Return whether a new channel takes a message that another one refused.

        If it does not, the queue is full, or has no leader yet, or its owner wants it to refuse.
        """
        channel = self._connections[0].channel(publisher_confirms=True)
        with self._lifetime.requesting():
            try:
                await channel.initialize()
                fresh = await self._connections[0].content_channel(channel)
                self._lifetime.end_callbacks.add(
                    on_end := lambda: fresh.close(self._lifetime.error())
                )
                watch = ConfirmWatch(self._connections[0], fresh, self._lifetime.give_up)
                try:
                    await fresh.publish(head_on(fresh.number), message_id, body)
                except (QueueFull, Unroutable):
                    return False
                finally:
                    watch.close()
                    self._lifetime.end_callbacks.discard(on_end)
                return True
            finally:
                with contextlib.suppress(LinkLost), map_exceptions():
                    await channel.close()

    def _choose_channel(self, *, urgent: bool) -> ContentChannel:
        """Choose the channel to publish on.

        A blocked broker stops reading from every connection that publishes. Publishing on the
        consuming connection would then hold up its acknowledgements as well.
        """
        if urgent and self._publish_channel.unconfirmed_bytes > _LITTLE_BYTES:
            if not any(connection.blocking.reason for connection in self._connections):
                return self._get_channel
        return self._publish_channel

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        consumer = await Consumer(queue, self._connections[1], self._lifetime).start(
            prefetch, exclusive=exclusive, replicated=queue in self._quorum
        )
        return consumer.deliveries()

    async def get(self, queue: str, *, foreign: bool = False) -> Delivery | None:
        if foreign:
            return await self._getter.get(queue)
        self._lifetime.check()
        content = await self._get_channel.take(queue)
        return None if content is None else AmqpDelivery(content, queue)

    async def follow(self, stream: str, *, since: Since = None) -> AsyncGenerator[Delivery]:
        arguments = {"x-stream-offset": "first" if since is None else since}
        return (await self._stream(stream, arguments)).acked()

    async def newest(self, stream: str) -> Delivery | None:
        # "last" is the last chunk, which may hold many entries.
        return await (await self._stream(stream, {"x-stream-offset": "last"})).newest()

    async def _stream(self, stream: str, arguments: dict[str, Any]) -> Consumer:
        consumer = Consumer(stream, self._connections[1], self._lifetime)
        return await consumer.start(STREAM_PREFETCH, arguments=arguments)

    async def tap(self, queue: Queue, bindings: Iterable[Binding]) -> AsyncGenerator[Delivery]:
        if queue.arguments.get("x-queue-type") == "quorum":
            await self.declare([queue])
        else:
            with self._lifetime.requesting("configure"):
                await _finished(
                    self._requests.queue_declare(
                        queue.name, exclusive=True, auto_delete=True, arguments={**queue.arguments}
                    )
                )
        await self.declare(bindings)
        consumer = Consumer(queue.name, self._connections[1], self._lifetime)
        return (await consumer.start(_TAP_PREFETCH, exclusive=True)).acked()

    async def unbind(self, binding: Binding) -> None:
        with self._lifetime.requesting("bind"):
            unbinding = self._requests.queue_unbind(binding.queue, binding.exchange, binding.key)
            await _finished(unbinding)

    async def counts(self, queue: str) -> Counts | None:
        declare_ok = await self._request_or_none(
            lambda channel: channel.queue_declare(queue, passive=True)
        )
        if declare_ok is None:
            return None
        return Counts(int(declare_ok.message_count or 0), int(declare_ok.consumer_count or 0))

    async def purge(self, queue: str) -> int:
        with self._lifetime.requesting("read"):
            purge_ok = await _finished(self._requests.queue_purge(queue))
            return int(purge_ok.message_count or 0)

    async def lost(self) -> None:
        await self._lifetime.lost()

    async def close(self) -> None:
        self._lifetime.end()
        # Concurrently: each may run into its timeout, and reconnecting waits for both.
        connections = filter(None, (*self._connections, self._getter.connection))
        await asyncio.gather(*map(close, connections))


async def _finished(request: Awaitable[_T]) -> _T:
    """Await a request that goes on when the caller is cancelled.

    aiormq would close the channel, which loses the link, and if the broker closes the channel at
    this moment, a second time, which ends the connection.
    """
    requesting = asyncio.ensure_future(request)
    # If the caller is cancelled, nobody else retrieves the error of a link that is lost.
    requesting.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(requesting)


async def _publish_in_halves(publish: Callable[..., Awaitable[None]], keys: Sequence[str]) -> None:
    """Publish a message twice, because its keys do not fit into one frame."""
    refusals: list[Unroutable | QueueFull] = []
    middle = len(keys) // 2
    for half in (keys[:middle], keys[middle:]):
        try:
            await publish(keys=half)
        except (Unroutable, QueueFull) as refusal:
            refusals.append(refusal)
    full = [refusal for refusal in refusals if isinstance(refusal, QueueFull)]
    if full or len(refusals) == 2:  # else some queue has it
        raise (full or refusals)[0]
