"""The queues of the in-memory broker, their messages and the bindings between them."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from fluffle_common.protocol.topology import ArgumentValue, Binding, Exchange, Queue
from fluffle_common.transport.base import MAX_LISTED_KEYS, Body, Properties, QueueFull


class Holder(Protocol):
    """A holder of unacknowledged deliveries: a link."""

    unacked: list[MemoryDelivery]


@dataclass(eq=False)
class StoredMessage:
    """A message in a queue."""

    body: Body
    properties: Properties
    exchange: str
    keys: tuple[str, ...]
    sent_at: float
    redelivered: bool = False
    number: int = 0  # its position in the queue


@dataclass(eq=False)
class Consumer:
    """A consumer of a queue."""

    link: Holder
    prefetch: int
    exclusive: bool
    deliveries: asyncio.Queue[MemoryDelivery | None] = field(default_factory=asyncio.Queue)
    """Ends with None once the link is lost."""
    unacked: int = 0


@dataclass(eq=False)
class MemoryQueue:
    """A queue, or a stream."""

    spec: Queue
    ready: deque[StoredMessage] = field(default_factory=deque)
    consumers: list[Consumer] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    arrivals: set[asyncio.Event] = field(default_factory=set)  # one for each stream reader

    @property
    def is_stream(self) -> bool:
        """Whether this is a stream, which keeps what is read."""
        return self.spec.arguments.get("x-queue-type") == "stream"

    @cached_property
    def limits(self) -> dict[str, ArgumentValue]:
        """The limits from its arguments and its policy, which always applies here."""
        declared = {key.removeprefix("x-"): of for key, of in self.spec.arguments.items()}
        return {**self.spec.limits, **declared}

    def put(self, message: StoredMessage) -> None:
        """Add a message; raise ``QueueFull`` if the queue is full and rejects new messages."""
        self.ready.append(message)
        if self.limits.get("overflow") == "reject-publish" and self._is_over_limit():
            self.ready.pop()
            raise QueueFull(f"queue '{self.spec.name}' is full")
        message.number = next(self.numbers)
        while self.ready and self._is_over_limit():
            self.ready.popleft()
        for arrival in self.arrivals:
            arrival.set()
        self.dispatch()

    def _is_over_limit(self) -> bool:
        most, most_bytes = (
            float(self.limits.get(name, math.inf)) for name in ("max-length", "max-length-bytes")
        )
        if most_bytes < math.inf and sum(len(one.body) for one in self.ready) > most_bytes:
            return True
        return len(self.ready) > most

    def dispatch(self) -> None:
        """Deliver the ready messages round robin to the consumers below their prefetch."""
        consumers = list(self.consumers)
        if self.spec.arguments.get("x-single-active-consumer"):
            consumers = consumers[:1]
        while self.ready:
            consumer = next((c for c in consumers if c.unacked < c.prefetch), None)
            if consumer is None:
                return
            message = self.ready.popleft()
            consumer.unacked += 1
            consumer.deliveries.put_nowait(MemoryDelivery(self, message, consumer.link, consumer))
            consumers.append(consumers.pop(consumers.index(consumer)))


class MemoryDelivery:
    """A delivery from a ``MemoryQueue``."""

    def __init__(
        self,
        queue: MemoryQueue,
        message: StoredMessage,
        link: Holder,
        consumer: Consumer | None = None,
    ) -> None:
        self.body: Body = message.body
        self.properties = message.properties
        self.redelivered = message.redelivered
        self.queue = queue.spec.name
        self.exchange = message.exchange
        self.keys = message.keys if len(message.keys) <= MAX_LISTED_KEYS else message.keys[:1]
        self.sent_at: float | None = message.sent_at
        self.offset = message.number if queue.is_stream else None
        self.consumer = consumer
        self._source, self._message, self._link = queue, message, link
        link.unacked.append(self)

    def ack(self) -> None:
        if self._settle():
            self._source.dispatch()

    def release(self) -> None:
        self.give_back()
        self._source.dispatch()

    def give_back(self) -> None:
        """Put it back at its position, marked as redelivered, without dispatching it."""
        if self._settle():
            bisect.insort(self._source.ready, self._message, key=lambda message: message.number)
            self._message.redelivered = True

    def _settle(self) -> bool:
        if self not in self._link.unacked:
            return False
        self._link.unacked.remove(self)
        if self.consumer is not None:
            self.consumer.unacked -= 1
        return True


class Bindings:
    """The bindings of all exchanges, indexed because there may be thousands."""

    def __init__(self) -> None:
        self._queues: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # exchange and key

    def add(self, binding: Binding) -> None:
        """Add a binding."""
        self._queues[binding.exchange, binding.key].add(binding.queue)

    def discard(self, binding: Binding) -> None:
        """Remove a binding if it exists."""
        self._queues[binding.exchange, binding.key].discard(binding.queue)

    def forget(self, queue: str) -> None:
        """Remove all bindings of a queue."""
        for queues in self._queues.values():
            queues.discard(queue)

    def __iter__(self) -> Iterator[Binding]:
        """Yield all bindings."""
        for (exchange, key), queues in self._queues.items():
            yield from (Binding(queue, exchange, key) for queue in queues)

    def queues(self, exchange: Exchange, key: str) -> set[str]:
        """Return the names of the queues that a key routes to."""
        keys = [key]
        if exchange.type == "fanout":
            keys = [any_key for name, any_key in self._queues if name == exchange.name]
        elif exchange.type == "topic":
            words = key
            while words:
                keys.append(f"{words}.#")
                words = words.rpartition(".")[0]
        return {queue for each in keys for queue in self._queues.get((exchange.name, each), ())}
