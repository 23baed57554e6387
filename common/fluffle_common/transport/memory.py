"""An in-memory broker that keeps the same contract as RabbitMQ.

It implements queues, streams, routing, acknowledgements, redelivery, prefetch, competing and
exclusive consumers, length limits and forced disconnects. Tests and simulations run whole
federations on it in one process; ``tests/contract`` holds it to the same rules as RabbitMQ.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from fluffle_common.clock import wall_time
from fluffle_common.debug_loggers import logger
from fluffle_common.errors import LinkLost
from fluffle_common.protocol.topology import Binding, Entity, Exchange, Queue
from fluffle_common.transport.base import (
    Blocking,
    Body,
    Counts,
    Delivery,
    Link,
    OtherArguments,
    Properties,
    QueueFull,
    QueueInUse,
    Since,
    Transport,
    Unroutable,
)
from fluffle_common.transport.memory_queues import (
    Bindings,
    Consumer,
    MemoryDelivery,
    MemoryQueue,
    StoredMessage,
)

_LOG = logger("transport.link")


class MemoryLink(Link):
    """A link to a ``MemoryBroker``."""

    incomplete_bytes = 0

    def __init__(self, broker: MemoryBroker) -> None:
        self.blocking = broker.blocking
        self.unacked: list[MemoryDelivery] = []
        self._broker = broker
        self._lost = asyncio.Event()
        self._taps: set[str] = set()

    async def declare(self, entities: Iterable[Entity]) -> None:
        self._check()
        for entity in entities:
            _LOG.debug("declaring %s", entity)
            if isinstance(entity, Binding):
                if not self._broker.bind(entity):  # RabbitMQ would close the channel
                    self.cut()
                    raise LinkLost(
                        f"cannot bind queue '{entity.queue}' to exchange '{entity.exchange}', "
                        "because one of the two does not exist"
                    )
            else:
                self._broker.declare(entity)

    async def exists(self, exchange: str) -> bool:
        self._check()
        return exchange in self._broker.exchanges

    async def bind(self, bindings: Iterable[Binding]) -> bool:
        self._check()
        return all(self._broker.bind(binding) for binding in bindings)

    async def publish(
        self,
        body: Body,
        properties: Properties,
        *,
        exchange: str,
        keys: Sequence[str],
        urgent: bool = False,
    ) -> None:
        await self._wait_unblocked()
        message = StoredMessage(body, properties, exchange, tuple(keys), float(int(wall_time())))
        if exchange and exchange not in self._broker.exchanges:  # RabbitMQ would close the channel
            self.cut()
            raise LinkLost(f"there is no exchange '{exchange}'")
        self._broker.route(message, exchange, keys)

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        self._check()
        source = self._find(queue)
        if source.consumers and (exclusive or source.consumers[0].exclusive):
            raise QueueInUse(f"queue '{queue}' has another consumer")
        consumer = Consumer(self, prefetch, exclusive)
        source.consumers.append(consumer)
        source.dispatch()
        return self._deliveries(source, consumer)

    async def _deliveries(
        self, source: MemoryQueue, consumer: Consumer
    ) -> AsyncGenerator[Delivery]:
        try:
            while (delivery := await consumer.deliveries.get()) is not None:
                await asyncio.sleep(0)  # as over a socket, others run between two messages
                self._check()
                yield delivery
            self._check()  # raises, since the link is lost
        finally:
            if consumer in source.consumers:
                source.consumers.remove(consumer)
                for delivery in reversed([d for d in self.unacked if d.consumer is consumer]):
                    delivery.give_back()
                source.dispatch()

    async def follow(self, stream: str, *, since: Since = None) -> AsyncGenerator[Delivery]:
        self._check()
        return self._entries(self._find(stream, reads=True), since)

    async def _entries(self, source: MemoryQueue, since: Since) -> AsyncGenerator[Delivery]:
        offset = since if isinstance(since, int) else 0
        at = since.timestamp() if isinstance(since, datetime) else 0.0
        arrival = asyncio.Event()
        source.arrivals.add(arrival)
        try:
            while True:
                arrival.clear()
                self._check()
                for message in [m for m in source.ready if m.number >= offset]:
                    self._check()
                    offset = message.number + 1
                    if message.sent_at >= int(at):
                        yield self._copy(source, message)
                await arrival.wait()
        finally:
            source.arrivals.discard(arrival)

    def _copy(self, source: MemoryQueue, message: StoredMessage) -> Delivery:
        copy = MemoryDelivery(source, message, self)
        copy.ack()  # so that losing the link does not put it into the stream again
        return copy

    async def newest(self, stream: str) -> Delivery | None:
        self._check()
        source = self._find(stream, reads=True)
        return self._copy(source, source.ready[-1]) if source.ready else None

    async def get(self, queue: str, *, foreign: bool = False) -> Delivery | None:
        self._check()
        if foreign and queue not in self._broker.queues:
            return None
        source = self._find(queue)
        if not source.ready:
            return None
        return MemoryDelivery(source, source.ready.popleft(), self)

    async def tap(self, queue: Queue, bindings: Iterable[Binding]) -> AsyncGenerator[Delivery]:
        await self.declare([queue, *bindings])
        self._taps.add(queue.name)
        return self._copies(queue.name, await self.consume(queue.name, prefetch=1, exclusive=True))

    async def _copies(
        self, queue: str, deliveries: AsyncGenerator[Delivery]
    ) -> AsyncGenerator[Delivery]:
        try:
            async with contextlib.aclosing(deliveries):
                async for delivery in deliveries:
                    delivery.ack()
                    yield delivery
        finally:
            self._taps.discard(queue)
            self._broker.delete(queue)

    async def unbind(self, binding: Binding) -> None:
        self._check()
        self._broker.bindings.discard(binding)

    async def counts(self, queue: str) -> Counts | None:
        self._check()
        source = self._broker.queues.get(queue)
        return Counts(len(source.ready), len(source.consumers)) if source else None

    async def purge(self, queue: str) -> int:
        self._check()
        ready = self._find(queue).ready
        count = len(ready)
        ready.clear()
        return count

    async def lost(self) -> None:
        await self._lost.wait()

    async def close(self) -> None:
        self.cut()

    def cut(self) -> None:
        """Lose the link now and return all unacknowledged messages to their queues."""
        if self._lost.is_set():
            return
        self._lost.set()
        for queue in self._broker.queues.values():
            for consumer in [c for c in queue.consumers if c.link is self]:
                queue.consumers.remove(consumer)
                consumer.deliveries.put_nowait(None)
            for arrival in queue.arrivals:
                arrival.set()
        for delivery in reversed(list(self.unacked)):
            delivery.give_back()
        self._broker.links.discard(self)
        for tap in self._taps:
            self._broker.delete(tap)
        for queue in self._broker.queues.values():
            queue.dispatch()

    async def _wait_unblocked(self) -> None:
        """Wait until the broker accepts messages."""
        self._check()
        while self.blocking.reason is not None:
            events = (self.blocking.changed, self._lost)
            waits = [asyncio.ensure_future(event.wait()) for event in events]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            self._check()

    def _find(self, queue: str, *, reads: bool = False) -> MemoryQueue:
        source = self._broker.queues.get(queue)
        if source is None:  # RabbitMQ would close the channel
            self.cut()
            raise LinkLost(f"there is no queue '{queue}'")
        if source.is_stream and not reads:  # RabbitMQ would close the connection
            self.cut()
            raise LinkLost(f"messages cannot be removed from the stream '{queue}'")
        return source

    def _check(self) -> None:
        if self._lost.is_set():
            raise LinkLost("the connection was closed")


class MemoryBroker(Transport):
    """An in-memory broker; each ``open`` returns a separate link."""

    def __init__(self) -> None:
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, MemoryQueue] = {}
        self.bindings = Bindings()
        self.links: set[MemoryLink] = set()
        self.blocking = Blocking()
        self.up = True

    @property
    def address(self) -> str:
        return "memory"

    async def open(self) -> MemoryLink:
        if not self.up:
            raise LinkLost("the broker is down")
        link = MemoryLink(self)
        self.links.add(link)
        return link

    def stop(self) -> None:
        """Stop until ``up`` is set: cut all links, and lose the messages that are not durable."""
        self.up = False
        for link in list(self.links):
            link.cut()
        for queue in self.queues.values():
            queue.ready = deque(s for s in queue.ready if s.properties.durable)

    def bind(self, binding: Binding) -> bool:
        """Add a binding; return False if its queue or its exchange does not exist."""
        exists = binding.queue in self.queues and binding.exchange in self.exchanges
        if exists:
            self.bindings.add(binding)
        return exists

    def declare(self, entity: Exchange | Queue) -> None:
        """Create an exchange or a queue if it does not exist yet."""
        if isinstance(entity, Exchange):
            self.exchanges.setdefault(entity.name, entity)
        elif isinstance(entity, Queue):
            existing = self.queues.setdefault(entity.name, MemoryQueue(entity)).spec
            if existing.arguments != entity.arguments:
                raise OtherArguments(
                    f"queue '{entity.name}' already exists with different arguments; delete it"
                )

    def delete(self, queue: str) -> None:
        """Delete a queue and its bindings."""
        self.queues.pop(queue, None)
        self.bindings.forget(queue)

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange and its bindings."""
        self.exchanges.pop(name, None)
        for binding in [one for one in self.bindings if one.exchange == name]:
            self.bindings.discard(binding)

    def route(self, message: StoredMessage, exchange: str, keys: Sequence[str]) -> None:
        """Put a message once into every queue that one of the keys routes to."""
        targets = {name for key in keys for name in self._targets(exchange, key)}
        if not targets:
            listed = ", ".join(keys)
            raise Unroutable(f"no queue is bound to '{exchange}' for the routing key {listed}")
        error: QueueFull | None = None
        for name in sorted(targets):
            try:
                self.queues[name].put(replace(message))
            except QueueFull as full:  # the other queues still get it
                error = full
        if error is not None:
            raise error

    def _targets(self, exchange: str, key: str) -> set[str]:
        if not exchange:  # the default exchange routes to the queue named like the key
            return {key} & self.queues.keys()
        entity = self.exchanges[exchange]
        targets = self.bindings.queues(entity, key)
        if not targets and entity.alternate:
            return self._targets(entity.alternate, key)
        return targets
