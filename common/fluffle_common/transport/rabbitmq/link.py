"""One connection's life on RabbitMQ: see ``base.Link``.

A link is two connections, one to publish and one to consume, because a large message under way in
one direction delays acknowledgements and heartbeats behind it. What is urgent is published over the
other one while much is under way, so that no upload is taken for death.

aio_pika's ``connect_robust`` is not used: what it repairs by itself (consumers, prefetch, queues)
it repairs without a word to the layers above, and those have to know, since everything
unacknowledged comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import aiormq.exceptions
from aio_pika.abc import AbstractChannel
from aiormq.abc import AbstractChannel as UnderlayChannel

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.protocol.topology import Binding, Entity, Exchange, Queue, lock_of
from fluffle_common.transport.base import (
    NAMED,
    Body,
    Counts,
    Delivery,
    Link,
    Properties,
    QueueFull,
    Since,
)
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.confirms import ConfirmWatch
from fluffle_common.transport.rabbitmq.connection import Connection
from fluffle_common.transport.rabbitmq.delivery import AmqpDelivery, Arrivals
from fluffle_common.transport.rabbitmq.errors import Right, as_ours, declaring, meaning, told

_CLOSE_TIMEOUT_S = 2.0
# What is urgent does not wait behind more than this.
_LITTLE_BYTES = 16 * 2**10
# How many copies of the traffic a tap fetches ahead: they may be parts of 4 MiB.
_TAP_PREFETCH = 16
# How many entries of a stream are fetched ahead.
_STREAM_PREFETCH = 500
_STREAM_ACK_EVERY = 100
# How long a stream that seems empty is given to show an entry.
_EMPTY_S = 0.5


_T = TypeVar("_T")


class AmqpLink(Link):
    """See ``base.Link``."""

    def __init__(self, publishing: Connection, consuming: Connection, user: str) -> None:
        self._connections = (publishing, consuming)
        self._user = user
        self._gone = asyncio.Event()
        self._why: LinkLost | BrokerError = LinkLost("the link was closed")
        self._quorum: set[str] = set()  # the quorum queues that were declared over this link
        self._readers: dict[Arrivals, str] = {}
        self._contents: set[ContentChannel] = set()  # of the channels that are open
        self._get: AbstractChannel
        self._publishing: ContentChannel
        self._getting: ContentChannel  # what is urgent may be published there too
        # Over what was published on each of the two.
        self._watch, self._urgent_watch = map(self._watch_over, self._connections)
        self._trying: AbstractChannel | None = None
        self._one_tries = asyncio.Lock()

    async def start(self) -> AmqpLink:
        """Open the channels."""
        for connection in self._connections:
            connection.close_callbacks.add(self._lose)
        publishing, consuming = self._connections
        with as_ours(self._user):
            publish = publishing.channel(publisher_confirms=True)
            self._get = consuming.channel(publisher_confirms=True)
            for channel in (publish, self._get):
                await channel.initialize()
                channel.close_callbacks.add(self._lose)
            self._publishing = await publishing.contents(publish)
            self._getting = await consuming.contents(self._get)
        self._contents |= {self._publishing, self._getting}
        self._check()
        return self

    def _lose(self, _: Any, why: BaseException | None = None) -> None:
        if self._gone.is_set():
            return
        if isinstance(why, LinkLost):
            self._why = why
        elif why is not None:
            meant = meaning(told(why), self._user)
            self._why = meant if isinstance(meant, BrokerError) else LinkLost(told(why))
        self._end()

    def _error(self) -> LinkLost | BrokerError:
        """Return why the link is lost; a new error for each who asks."""
        return type(self._why)(str(self._why))

    def _end(self) -> None:
        self._gone.set()
        for watch in (self._watch, self._urgent_watch):
            watch.close()
        for arrived in self._readers:
            arrived.put(None)  # whoever waits there sees that it is over
        for contents in self._contents:
            contents.lose(self._error())

    def _check(self) -> None:
        if self._gone.is_set():
            raise self._error()

    @contextlib.contextmanager
    def _asking(self, right: Right | None = None) -> Iterator[None]:
        """Map what is raised while the broker is asked for something that takes a right."""
        self._check()
        try:
            with as_ours(self._user, right):
                yield
        except LinkLost:
            closed = self._connections[1].closed_by_broker
            if closed is not None:  # which says more than what aiormq raises of it
                raise meaning(closed[1], self._user, right) from None
            raise

    @property
    def blocked(self) -> str | None:
        """See ``base.Link``: of the publishing connection."""
        return self._connections[0].blocking.reason

    def blocking(self) -> AsyncGenerator[str | None]:
        """See ``base.Link``."""
        return self._connections[0].blocking.changes()

    async def declare(self, entities: Iterable[Entity]) -> None:
        """See ``base.Link``."""
        self._check()
        for entity in entities:
            right: Right = "bind" if isinstance(entity, Binding) else "configure"
            with declaring(), self._asking(right):
                channel = await self._get.get_underlay_channel()
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

    async def exists(self, exchange: str) -> bool:
        """See ``base.Link``."""
        return (await self._try(lambda on: on.exchange_declare(exchange, passive=True))) is not None

    async def bind(self, bindings: Iterable[Binding]) -> bool:
        """See ``base.Link``."""
        for each in bindings:
            if await self._try(functools.partial(_bind, each), "bind") is None:
                return False
        return True

    async def _try(
        self,
        ask: Callable[[UnderlayChannel], Awaitable[_T]],
        right: Right | None = None,
    ) -> _T | None:
        """Ask for something; return None where what it is about is not there.

        That closes the channel over which it was asked, so that one is for nothing else.
        """
        self._check()
        async with self._one_tries:
            with self._asking(right):
                if self._trying is None:
                    self._trying = self._connections[1].channel(publisher_confirms=False)
                    await self._trying.initialize()
                underlay = await self._trying.get_underlay_channel()
                try:
                    return await ask(underlay)
                except BaseException as wrong:
                    self._trying = None
                    if isinstance(wrong, aiormq.exceptions.ChannelNotFoundEntity):
                        return None
                    raise

    async def publish(
        self,
        body: Body,
        properties: Properties,
        *,
        exchange: str,
        keys: Sequence[str],
        urgent: bool = False,
    ) -> None:
        """See ``base.Link``."""
        self._check()
        first, *rest = keys
        headers: dict[str, frames.Value] = dict(properties.headers)
        if rest:
            headers["CC" if len(keys) <= NAMED else "BCC"] = rest  # the broker drops BCC
        contents, watch = self._lane(urgent=urgent)
        head = frames.publish(
            contents.number,
            len(body),
            exchange=exchange,
            key=first,
            kind=properties.type,
            message_id=properties.message_id,
            user=self._user,
            headers=headers,
            durable=properties.durable,
        )
        sending = watch.sending(len(head) + len(body))
        try:
            await contents.publish(head, properties.message_id, body)
        except QueueFull:
            if not self._quorum:
                raise
            why = "the broker refused a message: a queue is full, or changes its leader"
            self._lose(None, LinkLost(why))  # as in _unconfirmed
            raise self._error() from None
        finally:
            watch.settled(sending)

    def _lane(self, *, urgent: bool) -> tuple[ContentChannel, ConfirmWatch]:
        """Choose the connection to publish over.

        A broker that takes nothing would take nothing over the other connection either, from then
        on, not even the acknowledgements there.
        """
        blocked = any(connection.blocking.reason for connection in self._connections)
        if urgent and not blocked and self._watch.under_way_bytes > _LITTLE_BYTES:
            return self._getting, self._urgent_watch
        return self._publishing, self._watch

    def _watch_over(self, connection: Connection) -> ConfirmWatch:
        blocking = connection.blocking
        return ConfirmWatch(connection, self._unconfirmed, lambda: blocking.reason is not None)

    def _unconfirmed(self, why: str) -> None:
        """Give the link up.

        While a quorum queue changes its leader, a channel can get into a state in which RabbitMQ
        confirms nothing that it sends there any more, or refuses all of it, which looks as if the
        queue were full. Only another channel helps, which another link begins with.
        """
        self._lose(None, LinkLost(why))

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        """See ``base.Link``."""
        return self._deliveries(queue, *await self._subscribe(queue, prefetch, exclusive=exclusive))

    async def _subscribe(
        self,
        queue: str,
        prefetch: int,
        *,
        exclusive: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> tuple[Arrivals, AbstractChannel, ContentChannel]:
        """Begin to consume over a channel of its own."""
        arrived = Arrivals()
        with self._asking("read"):
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
                with as_ours(self._user, "configure"):
                    await underlay.queue_declare(
                        lock_of(queue), exclusive=True, arguments={"x-queue-type": "classic"}
                    )
            contents = await self._connections[1].contents(channel, arrived.put, prefetch)
            begun = await underlay.basic_consume(
                queue, _nothing, exclusive=exclusive, arguments=arguments
            )
        channel.close_callbacks.add(self._lose)
        underlay.on_consumer_cancel_callbacks.add(self._cancelled)  # the queue was deleted
        self._readers[arrived] = str(begun.consumer_tag)
        self._contents.add(contents)
        return arrived, channel, contents

    async def _deliveries(
        self,
        queue: str,
        arrived: Arrivals,
        channel: AbstractChannel,
        contents: ContentChannel,
    ) -> AsyncGenerator[AmqpDelivery]:
        try:
            while True:
                self._check()
                if not arrived.there:
                    await arrived.some()
                content = arrived.there.popleft()
                if content is not None:
                    self._check()
                    yield AmqpDelivery(content, queue, contents)
        finally:
            await self._unsubscribe(arrived, channel, contents)

    async def _unsubscribe(
        self, arrived: Arrivals, channel: AbstractChannel, contents: ContentChannel
    ) -> None:
        tag = self._readers.pop(arrived)
        self._contents.discard(contents)
        contents.lose(LinkLost("the reading was ended"))
        if not self._gone.is_set():
            channel.close_callbacks.discard(self._lose)
            with contextlib.suppress(LinkLost, TimeoutError), as_ours():
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await _cancel_and_close(channel, tag)

    def _cancelled(self, *_: Any) -> None:
        self._lose(None, LinkLost("a queue we read from was deleted"))

    async def get(self, queue: str) -> Delivery | None:
        """See ``base.Link``."""
        self._check()
        content = await self._getting.get(queue)
        return AmqpDelivery(content, queue, self._getting) if content is not None else None

    async def follow(self, stream: str, *, since: Since = None) -> AsyncGenerator[Delivery]:
        """See ``base.Link``."""
        arguments = {"x-stream-offset": "first" if since is None else since}
        reading = await self._subscribe(stream, _STREAM_PREFETCH, arguments=arguments)
        return _entries(self._deliveries(stream, *reading))

    async def newest(self, stream: str) -> Delivery | None:
        """See ``base.Link``."""
        last = {"x-stream-offset": "last"}  # the last chunk: as many as were written in one go
        arrived, channel, contents = await self._subscribe(stream, _STREAM_PREFETCH, arguments=last)
        found: AmqpDelivery | None = None
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + _EMPTY_S
        try:
            while True:
                with as_ours():  # whatever the broker has sent by now is here before the answer
                    await channel.set_qos(prefetch_count=_STREAM_PREFETCH)
                self._check()
                if not arrived.there:
                    if found is not None or loop.time() >= gives_up_at:
                        return found
                    await asyncio.sleep(_EMPTY_S / 10)
                while arrived.there:
                    content = arrived.there.popleft()
                    if content is not None:
                        found = AmqpDelivery(content, stream, contents)
                        found.ack()
        finally:
            await self._unsubscribe(arrived, channel, contents)

    async def tap(self, queue: Queue, bindings: Iterable[Binding]) -> AsyncGenerator[Delivery]:
        """See ``base.Link``."""
        with self._asking("configure"):
            channel = await self._get.get_underlay_channel()
            await channel.queue_declare(
                queue.name, exclusive=True, auto_delete=True, arguments={**queue.arguments}
            )
        await self.declare(bindings)
        return _ours_at_once(await self.consume(queue.name, prefetch=_TAP_PREFETCH, exclusive=True))

    async def unbind(self, binding: Binding) -> None:
        """See ``base.Link``."""
        with self._asking("bind"):
            channel = await self._get.get_underlay_channel()
            await channel.queue_unbind(binding.queue, binding.exchange, binding.key)

    async def counts(self, queue: str) -> Counts | None:
        """See ``base.Link``."""
        told = await self._try(lambda on: on.queue_declare(queue, passive=True))
        if told is None:
            return None
        return Counts(int(told.message_count or 0), int(told.consumer_count or 0))

    async def purge(self, queue: str) -> int:
        """See ``base.Link``."""
        with self._asking("read"):
            channel = await self._get.get_underlay_channel()
            return int((await channel.queue_purge(queue)).message_count or 0)

    async def lost(self) -> None:
        """See ``base.Link``."""
        await self._gone.wait()
        if isinstance(self._why, BrokerError):
            raise self._error()

    async def close(self) -> None:
        """See ``base.Link``."""
        self._end()
        # Side by side: each may wait in vain for an answer, and nobody reconnects before that.
        await asyncio.gather(*(close(connection) for connection in self._connections))


async def _bind(binding: Binding, on: UnderlayChannel) -> Any:
    return await on.queue_bind(binding.queue, binding.exchange, binding.key)


async def _nothing(_: Any) -> None:
    """Take what aiormq would deliver, which is nothing: it never sees a content."""


async def _ours_at_once(deliveries: AsyncGenerator[Delivery]) -> AsyncGenerator[Delivery]:
    async with contextlib.aclosing(deliveries):
        async for delivery in deliveries:
            delivery.ack()
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
                entry.ack(all_before=True)
            yield entry


async def _cancel_and_close(channel: AbstractChannel, tag: str) -> None:
    """End a consumer; of a stream, RabbitMQ 3.10 goes on to count who only closes the channel."""
    await (await channel.get_underlay_channel()).basic_cancel(tag)
    await channel.close()


async def close(connection: Connection) -> None:
    """Close a connection; nothing raises, and it takes no longer than a moment."""
    with contextlib.suppress(LinkLost), as_ours():
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await connection.close()
