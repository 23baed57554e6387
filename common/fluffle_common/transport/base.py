"""The transport contract, which ``rabbitmq`` and ``memory`` implement.

A ``Transport`` opens a ``Link``, which represents one connection to the broker. A link never
repairs itself. When any part of it fails, the whole link is lost, every pending call raises
``LinkLost``, and the broker redelivers unacknowledged messages over the next link.
``reconnecting`` opens that link, with backoff. The layers above therefore handle one event, a lost
link, instead of a connection in an unknown state.

``tests/contract`` checks that both implementations keep these rules:

- ``publish`` returns once the broker has confirmed the message. It raises ``LinkLost`` if the
  outcome is unknown; the caller then sends the message again with the same ``message_id``.
- A message is delivered to one consumer. If that consumer's link is lost before the
  acknowledgement, the message is delivered again, marked as ``redelivered``. At most ``prefetch``
  deliveries are unacknowledged at a time.
- Acknowledging over a lost link does nothing, because the redelivery is already under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple, Protocol

from fluffle_common.errors import BrokerError
from fluffle_common.protocol.events import Blocked, RunEvent, Unblocked
from fluffle_common.protocol.topology import Binding, Entity, Queue

HeaderValue = str | int | float | bool
Body = bytes | memoryview
Since = datetime | int | None


class QueueFull(Exception):
    """The queue is full and did not take the message; the sender can try again later."""


class Unroutable(Exception):
    """No queue is bound for this message; the broker did not take it."""


class QueueInUse(Exception):
    """Another consumer has exclusive use of the queue."""


class AccessRefused(BrokerError):
    """The broker's user lacks a permission: ``lacking`` says which, without the remedy.

    The remedy is that of a coordinator or worker; commands that inspect need other permissions.
    """

    def __init__(self, lacking: str) -> None:
        super().__init__(lacking)
        self.lacking = lacking

    def __str__(self) -> str:
        return f"{self.lacking}; grant the permissions that 'fluffle broker permissions' prints"


class OtherArguments(BrokerError):
    """A declared queue or exchange already exists with different arguments."""


class UnknownQueueType(BrokerError):
    """The broker does not support a queue type, such as streams; the link may be lost as well."""


class Properties(NamedTuple):
    """The properties of a message, which RabbitMQ's management page shows too.

    ``user`` is the sender's user name. The broker verifies it; it is None if the sender did not
    set it.
    """

    type: str = ""
    message_id: str = ""
    headers: Mapping[str, HeaderValue] = MappingProxyType({})
    durable: bool = True
    user: str | None = None


# A message lists its recipients only up to this number. Encoding and decoding a thousand names in
# each of a thousand copies would take longer than everything else.
MAX_LISTED_KEYS = 16


class Counts(NamedTuple):
    """The ready messages and the consumers of a queue; AMQP does not report unacknowledged ones."""

    ready: int
    consumers: int


class Delivery(Protocol):
    """A message that the broker has delivered from ``queue`` and that awaits an acknowledgement."""

    body: Body
    queue: str

    @property
    def redelivered(self) -> bool:
        """Whether it was delivered before."""

    @property
    def exchange(self) -> str:
        """The exchange that it was published to."""

    @property
    def properties(self) -> Properties:
        """Its type, identity, headers and sender."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The routing keys that it was sent to; only the first if above ``MAX_LISTED_KEYS``."""

    @property
    def sent_at(self) -> float | None:
        """The sender's timestamp in whole seconds since 1970; None if it is missing."""

    @property
    def offset(self) -> int | None:
        """Its offset in a stream; None in any other queue."""

    def ack(self) -> None:
        """Acknowledge it; the broker is told soon, and before the link closes."""

    def release(self) -> None:
        """Return it to its queue."""


class Blocking:
    """Whether the broker blocks publishers, and why.

    RabbitMQ blocks publishers while it is out of memory or disk space; consuming goes on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.changed = asyncio.Event()  # replaced when it is set

    def set(self, reason: str | None) -> None:
        """Set the reason for blocking, or None when the broker accepts messages again."""
        if reason != self.reason:
            self.reason = reason
            self.changed.set()
            self.changed = asyncio.Event()


class Link(Protocol):
    """One connection to the broker, from opening to loss.

    Any call may raise a ``BrokerError`` instead of ``LinkLost`` if the broker refuses a request and
    would refuse it again, for example because the user lacks a permission. The error names it.
    """

    blocking: Blocking

    @property
    def incomplete_bytes(self) -> int:
        """How many bytes have arrived of messages that are still incomplete."""

    async def declare(self, entities: Iterable[Entity]) -> None:
        """Create the queues, exchanges and bindings that do not exist yet.

        Raises:
            OtherArguments: if one exists with different arguments.
            UnknownQueueType: if the broker does not support the type of a queue.
        """

    async def exists(self, exchange: str) -> bool:
        """Return whether an exchange of this name exists.

        Since RabbitMQ 4.2.6, this needs a permission on it.
        """

    async def bind(self, bindings: Iterable[Binding]) -> bool:
        """Bind existing queues to existing exchanges; a binding that exists is left as it is.

        Returns:
            False if a queue or an exchange is missing, or a queue is exclusive to another link.
            Unlike ``declare``, this keeps the link.
        """

    async def publish(
        self,
        body: Body,
        properties: Properties,
        *,
        exchange: str,
        keys: Sequence[str],
        urgent: bool = False,
    ) -> None:
        """Send one message to every queue bound to ``exchange`` under one of ``keys``.

        There is no time limit as long as bytes of the message leave. An ``urgent`` message does not
        wait behind large messages that were published before it.

        Raises:
            Unroutable: if no queue is bound.
            QueueFull: if a queue refused the message because it is full, or, with RabbitMQ 4.3,
                because it is being deleted.
            LinkLost: if the outcome is unknown.
        """

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        """Start consuming; the iterator yields deliveries and raises ``LinkLost`` at the end.

        Closing the iterator ends consumption; unacknowledged messages return to the queue. Before
        the first delivery is requested, only the end of the link does.

        Raises:
            QueueInUse: if ``exclusive`` is set and the queue has another consumer, or if another
                consumer is exclusive.
        """

    async def get(self, queue: str, *, foreign: bool = False) -> Delivery | None:
        """Take one message; return None if the queue is empty.

        ``foreign`` is for a queue that someone else owns: if the broker refuses because the queue
        is missing, in exclusive use or a stream, the result is None and the link stays.
        """

    async def follow(self, stream: str, *, since: Since = None) -> AsyncGenerator[Delivery]:
        """Start reading a stream; the iterator raises ``LinkLost`` when the link is lost.

        Reading removes nothing and needs no acknowledgement. Entries arrive once each, in the order
        of their offsets.

        Args:
            stream: the name of the stream.
            since: the first offset; or a time by the broker's clock, which may also yield a few
                earlier entries; or None for the oldest entry that the broker keeps.
        """

    async def newest(self, stream: str) -> Delivery | None:
        """Return the last entry of a stream; None if the stream is empty."""

    async def tap(self, queue: Queue, bindings: Iterable[Binding]) -> AsyncGenerator[Delivery]:
        """Declare a queue for copies of the traffic and read it; copies need no acknowledgement.

        The queue is exclusive to this link and is deleted with the iterator or the link; a quorum
        queue is not exclusive, and expires after that. Use ``declare`` to add bindings and
        ``unbind`` to remove them. Publishers cannot tell it from another queue: a message that
        reaches only a tap is not ``Unroutable``.
        """

    async def unbind(self, binding: Binding) -> None:
        """Remove a binding if it exists."""

    async def counts(self, queue: str) -> Counts | None:
        """Return the counts of a queue; None if it is missing, or exclusive to another link."""

    async def purge(self, queue: str) -> int:
        """Delete the ready messages of a queue and return how many there were."""

    async def lost(self) -> None:
        """Return when the link is lost; raise ``BrokerError`` if another would be lost as well."""

    async def close(self) -> None:
        """Close the link; this never raises."""


class Transport(Protocol):
    """A way to open links to a broker."""

    @property
    def address(self) -> str:
        """The broker's address for display, without credentials."""

    async def open(self) -> Link:
        """Open a link.

        Raises:
            LinkLost: if the broker cannot be reached now and another attempt may succeed.
            BrokerError: if another attempt cannot succeed, as with refused credentials or an
                unknown vhost.
        """


async def report_blocking(link: Link, emit: Callable[[RunEvent], object]) -> None:
    """Emit an event whenever the broker blocks or unblocks publishers, without end."""
    reported: str | None = None
    while True:
        if link.blocking.reason == reported:
            await link.blocking.changed.wait()
        else:
            reported = link.blocking.reason
            emit(Unblocked() if reported is None else Blocked(reason=reported))
