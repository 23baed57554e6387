"""One connection's life on RabbitMQ: see ``transport.Link``.

A link is two connections, one to publish and one to consume, because a large message under way in
one direction delays acknowledgements and heartbeats behind it. aio_pika's ``connect_robust`` is not
used: what it repairs by itself (consumers, prefetch, queues) it repairs without a word to the
layers above, and those have to know, since everything unacknowledged comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from fluffle_common.amqp_connection import LARGE_BYTES, Connection, Incoming
from fluffle_common.amqp_errors import as_ours, declaring, told
from fluffle_common.errors import LinkLost
from fluffle_common.topology import Binding, Entity, Exchange, Queue, lock_of
from fluffle_common.transport import (
    NAMED,
    Body,
    Counts,
    Delivery,
    HeaderValue,
    Link,
    Properties,
    Since,
)

_CLOSE_TIMEOUT_S = 2.0
# A message is confirmed within this time, and what it takes to get there on the slowest network.
_CONFIRM_S = 20.0
_SLOWEST_BYTES_PER_S = 50_000
# How many copies of the traffic a tap fetches ahead: they may be parts of 4 MiB.
_TAP_PREFETCH = 16
# How many entries of a stream are fetched ahead.
_STREAM_PREFETCH = 500
_STREAM_ACK_EVERY = 100
# How long a stream that seems empty is given to show an entry.
_EMPTY_S = 0.5


class AmqpDelivery:
    """See ``transport.Delivery``."""

    def __init__(self, message: AbstractIncomingMessage, queue: str, incoming: Incoming) -> None:
        beside = incoming.take(message.channel.number, message.delivery_tag or 0)
        self.body: Body = message.body if beside is None else beside
        self.queue = queue
        self.exchange = message.exchange or ""
        self.keys = _keys(message)
        self.sent_at = message.timestamp.timestamp() if message.timestamp else None
        offset = (message.headers or {}).get("x-stream-offset")
        self.offset = offset if isinstance(offset, int) else None
        self.redelivered = bool(message.redelivered)
        self.properties = Properties(
            type=message.type or "",
            message_id=message.message_id or "",
            headers=_readable(message.headers),
            durable=message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT,
            user=message.user_id,
        )
        # Not the message itself: whoever is done with ``body`` can let go of it before the ack.
        self._channel, self._tag = message.channel, message.delivery_tag  # None once it is settled

    async def ack(self, *, all_before: bool = False) -> None:
        """See ``transport.Delivery``; ``all_before``: and all that its channel brought before."""
        tag = self.disown()
        if tag is not None:
            with contextlib.suppress(LinkLost), as_ours():
                await self._channel.basic_ack(tag, multiple=all_before, wait=False)

    async def release(self) -> None:
        """See ``transport.Delivery``."""
        tag = self.disown()
        if tag is not None:
            with contextlib.suppress(LinkLost), as_ours():
                await self._channel.basic_nack(tag, requeue=True)

    def disown(self) -> int | None:
        """Return what it is acknowledged by, once: a second time would break the channel."""
        tag, self._tag = self._tag, None
        return tag


def _keys(message: AbstractIncomingMessage) -> tuple[str, ...]:
    more = (message.headers or {}).get("CC")
    return (message.routing_key or "", *map(str, more if isinstance(more, list) else ()))


def _readable(headers: Any) -> dict[str, HeaderValue]:
    return {k: v for k, v in (headers or {}).items() if isinstance(v, str | int | float | bool)}


class AmqpLink(Link):
    """See ``transport.Link``."""

    def __init__(self, publishing: Connection, consuming: Connection, user: str) -> None:
        self._connections = (publishing, consuming)
        self._outgoing, self._incoming = publishing.beside.outgoing, consuming.beside.incoming
        self._user = user
        self._gone = asyncio.Event()
        self._why = "the link was closed"
        self._under_way_bytes = 0
        self._quorum: set[str] = set()  # the quorum queues that were declared over this link
        self._readers: dict[asyncio.Queue[AbstractIncomingMessage | None], str] = {}
        self._publish: AbstractChannel
        self._get: AbstractChannel
        self._counting: AbstractChannel | None = None
        self._one_counts = asyncio.Lock()

    async def start(self) -> AmqpLink:
        """Open the channels."""
        for connection in self._connections:
            connection.close_callbacks.add(self._lose)
        publishing, consuming = self._connections
        with as_ours():
            self._publish = publishing.channel(publisher_confirms=True, on_return_raises=True)
            self._get = consuming.channel(publisher_confirms=False)
            for channel in (self._publish, self._get):
                await channel.initialize()
                channel.close_callbacks.add(self._lose)
        return self

    def _lose(self, _: Any, why: BaseException | None = None) -> None:
        if not self._gone.is_set():
            self._why = told(why) if why else self._why
            self._end()

    def _give_up(self, why: str) -> NoReturn:
        self._lose(None, LinkLost(why))
        raise LinkLost(self._why)

    def _end(self) -> None:
        self._gone.set()
        for arrived in self._readers:
            arrived.put_nowait(None)  # whoever waits there sees that it is over

    def _check(self) -> None:
        if self._gone.is_set():
            raise LinkLost(self._why)

    async def declare(self, entities: Iterable[Entity]) -> None:
        """See ``transport.Link``."""
        self._check()
        with as_ours(), declaring():
            channel = await self._get.get_underlay_channel()
            for entity in entities:
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
                        if arguments.get("x-queue-type") == "quorum":
                            self._quorum.add(name)
                    case Binding(queue, exchange, key):
                        await channel.queue_bind(queue, exchange, key)

    async def publish(
        self, body: Body, properties: Properties, *, exchange: str, keys: Sequence[str]
    ) -> None:
        """See ``transport.Link``."""
        self._check()
        first, *rest = keys
        headers: dict[str, Any] = dict(properties.headers)
        if rest:
            headers["CC" if len(keys) <= NAMED else "BCC"] = rest  # the broker drops BCC
        message = aio_pika.Message(
            b"",  # only its properties are used
            content_type="application/msgpack",
            type=properties.type,
            message_id=properties.message_id or None,
            headers=headers,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT
            if properties.durable
            else aio_pika.DeliveryMode.NOT_PERSISTENT,
            timestamp=datetime.now(UTC),
            user_id=self._user,
        )
        beside = (
            self._outgoing.token(body) if len(body) >= LARGE_BYTES else contextlib.nullcontext(body)
        )
        with as_ours(), self._confirming(len(body)) as patience_s, beside as sent:
            channel = await self._publish.get_underlay_channel()
            async with asyncio.timeout(patience_s):
                await channel.basic_publish(
                    bytes(sent),
                    exchange=exchange,
                    routing_key=first,
                    properties=message.properties,
                    mandatory=True,
                )

    @contextlib.contextmanager
    def _confirming(self, size_bytes: int) -> Iterator[float]:
        """Yield how long a confirmation may take, in seconds; one that never comes ends the link.

        While a quorum queue changes its leader, a channel can get into a state in which RabbitMQ
        confirms nothing that it sends there any more, or refuses all of it, which looks as if the
        queue were full. Only another channel helps, which another link begins with.
        """
        self._under_way_bytes += size_bytes
        patience_s = _CONFIRM_S + self._under_way_bytes / _SLOWEST_BYTES_PER_S
        try:
            yield patience_s
        except TimeoutError:
            self._give_up(f"the broker did not confirm a message within {patience_s:.0f} s")
        except aiormq.exceptions.DeliveryError:
            if not self._quorum:
                raise
            self._give_up("the broker refused a message: a queue is full, or changes its leader")
        finally:
            self._under_way_bytes -= size_bytes

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        """See ``transport.Link``."""
        arrived, channel = await self._subscribe(queue, prefetch, exclusive=exclusive)
        return self._deliveries(queue, arrived, channel)

    async def _subscribe(
        self,
        queue: str,
        prefetch: int,
        *,
        exclusive: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> tuple[asyncio.Queue[AbstractIncomingMessage | None], AbstractChannel]:
        """Begin to consume over a channel of its own."""
        self._check()
        arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        with as_ours():
            channel = self._connections[1].channel(publisher_confirms=False)
            # A refusal closes the channel, which must not take the link with it: so the channel
            # counts as part of the link only from here on.
            await channel.initialize()
            await channel.set_qos(prefetch_count=prefetch)
            underlay = await channel.get_underlay_channel()
            if exclusive and queue in self._quorum:
                # Quorum queues let in any number of exclusive consumers. A queue that only the
                # connection which declared it may use is a lock, gone with that connection or its
                # node.
                await underlay.queue_declare(
                    lock_of(queue), exclusive=True, arguments={"x-queue-type": "classic"}
                )
            source = await channel.get_queue(queue, ensure=False)
            tag = await source.consume(arrived.put, exclusive=exclusive, arguments=arguments)
        channel.close_callbacks.add(self._lose)
        underlay.on_consumer_cancel_callbacks.add(self._cancelled)  # the queue was deleted
        self._readers[arrived] = tag
        return arrived, channel

    async def _deliveries(
        self,
        queue: str,
        arrived: asyncio.Queue[AbstractIncomingMessage | None],
        channel: AbstractChannel,
    ) -> AsyncGenerator[AmqpDelivery]:
        try:
            while True:
                self._check()
                message = await arrived.get()
                if message is not None:
                    self._check()
                    yield AmqpDelivery(message, queue, self._incoming)
        finally:
            await self._unsubscribe(arrived, channel)

    async def _unsubscribe(
        self, arrived: asyncio.Queue[AbstractIncomingMessage | None], channel: AbstractChannel
    ) -> None:
        tag = self._readers.pop(arrived)
        if not self._gone.is_set():
            channel.close_callbacks.discard(self._lose)
            with contextlib.suppress(LinkLost, TimeoutError), as_ours():
                await asyncio.wait_for(_cancel_and_close(channel, tag), _CLOSE_TIMEOUT_S)

    def _cancelled(self, *_: Any) -> None:
        self._lose(None, LinkLost("a queue we read from was deleted"))

    async def get(self, queue: str) -> Delivery | None:
        """See ``transport.Link``."""
        self._check()
        with as_ours():
            source = await self._get.get_queue(queue, ensure=False)
            message = await source.get(fail=False)
        return AmqpDelivery(message, queue, self._incoming) if message is not None else None

    async def follow(self, stream: str, *, since: Since = None) -> AsyncGenerator[Delivery]:
        """See ``transport.Link``."""
        arguments = {"x-stream-offset": "first" if since is None else since}
        reading = await self._subscribe(stream, _STREAM_PREFETCH, arguments=arguments)
        return _entries(self._deliveries(stream, *reading))

    async def newest(self, stream: str) -> Delivery | None:
        """See ``transport.Link``."""
        last = {"x-stream-offset": "last"}  # the last chunk: as many as were written in one go
        arrived, channel = await self._subscribe(stream, _STREAM_PREFETCH, arguments=last)
        found: AmqpDelivery | None = None
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + _EMPTY_S
        try:
            while True:
                with as_ours():  # whatever the broker has sent by now is here before the answer
                    await channel.set_qos(prefetch_count=_STREAM_PREFETCH)
                self._check()
                if arrived.empty():
                    if found is not None or loop.time() >= gives_up_at:
                        return found
                    await asyncio.sleep(_EMPTY_S / 10)
                while not arrived.empty():
                    message = arrived.get_nowait()
                    if message is not None:
                        found = AmqpDelivery(message, stream, self._incoming)
                        await found.ack()
        finally:
            await self._unsubscribe(arrived, channel)

    async def tap(self, queue: Queue, bindings: Iterable[Binding]) -> AsyncGenerator[Delivery]:
        """See ``transport.Link``."""
        self._check()
        with as_ours():
            channel = await self._get.get_underlay_channel()
            await channel.queue_declare(
                queue.name, exclusive=True, auto_delete=True, arguments={**queue.arguments}
            )
        await self.declare(bindings)
        return _ours_at_once(await self.consume(queue.name, prefetch=_TAP_PREFETCH, exclusive=True))

    async def unbind(self, binding: Binding) -> None:
        """See ``transport.Link``."""
        self._check()
        with as_ours():
            channel = await self._get.get_underlay_channel()
            await channel.queue_unbind(binding.queue, binding.exchange, binding.key)

    async def counts(self, queue: str) -> Counts | None:
        """See ``transport.Link``."""
        self._check()
        # A queue that is not there closes the channel that asks, so that one is not shared.
        async with self._one_counts:
            with as_ours():
                if self._counting is None:
                    self._counting = self._connections[1].channel(publisher_confirms=False)
                    await self._counting.initialize()
                underlay = await self._counting.get_underlay_channel()
                try:
                    told = await underlay.queue_declare(queue, passive=True)
                except BaseException as wrong:
                    self._counting = None
                    if isinstance(wrong, aiormq.exceptions.ChannelNotFoundEntity):
                        return None
                    raise
        return Counts(int(told.message_count or 0), int(told.consumer_count or 0))

    async def purge(self, queue: str) -> int:
        """See ``transport.Link``."""
        self._check()
        with as_ours():
            channel = await self._get.get_underlay_channel()
            return int((await channel.queue_purge(queue)).message_count or 0)

    async def lost(self) -> None:
        """See ``transport.Link``."""
        await self._gone.wait()

    async def close(self) -> None:
        """See ``transport.Link``."""
        self._end()
        # Side by side: each may wait in vain for an answer, and nobody reconnects before that.
        await asyncio.gather(*(close(connection) for connection in self._connections))


async def _ours_at_once(deliveries: AsyncGenerator[Delivery]) -> AsyncGenerator[Delivery]:
    async with contextlib.aclosing(deliveries):
        async for delivery in deliveries:
            await delivery.ack()
            yield delivery


async def _entries(deliveries: AsyncGenerator[AmqpDelivery]) -> AsyncGenerator[Delivery]:
    """Acknowledge the entries of a stream many at a time, soon enough that more are sent."""
    count = 0
    async with contextlib.aclosing(deliveries):
        async for entry in deliveries:
            count += 1
            if count % _STREAM_ACK_EVERY:
                entry.disown()
            else:
                await entry.ack(all_before=True)
            yield entry


async def _cancel_and_close(channel: AbstractChannel, tag: str) -> None:
    """End a consumer; of a stream, RabbitMQ 3.10 goes on to count who only closes the channel."""
    await (await channel.get_underlay_channel()).basic_cancel(tag)
    await channel.close()


async def close(connection: Connection) -> None:
    """Close a connection; nothing raises, and it takes no longer than a moment."""
    with contextlib.suppress(LinkLost), as_ours():
        await asyncio.wait_for(connection.close(), _CLOSE_TIMEOUT_S)
