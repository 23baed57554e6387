"""What fluffle asks of a broker: the contract that ``rabbitmq`` and ``memory`` both keep.

A ``Transport`` opens a ``Link``, one connection's life. A link never repairs itself: when anything
of it breaks, all of it is lost, every waiting call raises ``LinkLost``, and what was delivered over
it and not acknowledged will be delivered again over another link. Repairing is opening a new link,
which ``reconnecting`` does with backoff; so every layer above sees one plain event instead of a
connection in an unknown state.

The contract, which ``tests/contract`` holds both implementations to:

- ``publish`` returns when the broker has taken the message, and raises ``LinkLost`` when that is
  unknown: the caller sends again, under the same ``message_id``.
- A delivery is handed out to one consumer, and again (``redelivered``) if that consumer's link is
  lost before it was acknowledged. At most ``prefetch`` are unacknowledged at a time.
- Acknowledging over a link that is lost does nothing: the redelivery is under way already.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
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
    """The queue has no room; nothing was lost, the sender tries again later."""


class Unroutable(Exception):
    """No queue is bound for this message; it was not taken."""


class QueueInUse(Exception):
    """Another consumer has the queue for itself."""


class OtherArguments(BrokerError):
    """What is declared is there already, with other arguments."""


class UnknownQueueType(BrokerError):
    """The broker has no queues of this type, such as streams; the link may be lost with it."""


class Properties(NamedTuple):
    """What travels beside a body, readable in RabbitMQ's own pages.

    ``user`` is filled in by the broker's own check of the sender, where the sender gave it.
    """

    type: str = ""
    message_id: str = ""
    headers: Mapping[str, HeaderValue] = MappingProxyType({})
    durable: bool = True
    user: str | None = None


# So many receivers of a message are named to each of them. To write a thousand names into a
# thousand messages, and to read them, would take longer than all the rest.
NAMED = 16


class Counts(NamedTuple):
    """What AMQP itself tells of a queue; what is unacknowledged it does not tell."""

    ready: int
    consumers: int


class Delivery(Protocol):
    """One message handed out to us, ours until we acknowledge it.

    ``queue`` is where it was taken from, ``exchange`` and ``keys`` are what it was published to; of
    more than ``NAMED`` keys only the first.
    ``sent_at`` is when, by its sender's clock: seconds since 1970, whole ones; None where the
    sender did not say. ``offset`` is its place in a stream, None elsewhere.
    """

    body: Body
    queue: str

    @property
    def redelivered(self) -> bool:
        """Whether it was handed out before."""

    @property
    def exchange(self) -> str:
        """See above."""

    @property
    def properties(self) -> Properties:
        """What travels beside the body."""

    @property
    def keys(self) -> tuple[str, ...]:
        """See above."""

    @property
    def sent_at(self) -> float | None:
        """See above."""

    @property
    def offset(self) -> int | None:
        """See above."""

    def ack(self) -> None:
        """We are done with it; the broker hears of it soon, and before the link is closed."""

    def release(self) -> None:
        """Give it back: it goes to the queue again."""


class Blocking:
    """Why a broker takes nothing that is published, if it does not, and who waits for news of it.

    RabbitMQ does that when it runs out of memory or disk; everything else goes on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.free = asyncio.Event()  # set while there is no reason
        self.free.set()
        self._changed = asyncio.Event()

    def set(self, reason: str | None) -> None:
        """Note it; None: it takes what is published again."""
        if reason != self.reason:
            self.reason = reason
            if reason is None:
                self.free.set()
            else:
                self.free.clear()
            self._changed.set()
            self._changed = asyncio.Event()

    async def changes(self) -> AsyncGenerator[str | None]:
        """Yield the reason of now, if there is one, and then what it is after each change."""
        known: str | None = None
        while True:
            changed = self._changed
            if self.reason != known:
                known = self.reason
                yield known
            else:
                await changed.wait()


class Link(Protocol):
    """One connection's life.

    Any call may raise a ``BrokerError`` instead of ``LinkLost``: what was asked is refused, and
    would be again, as for want of a right; the error says which.
    """

    @property
    def blocked(self) -> str | None:
        """Why the broker takes nothing from us at the moment, in its words; None: it does."""

    def blocking(self) -> AsyncGenerator[str | None]:
        """Yield ``blocked`` whenever it has changed, for ever; the first time if it is not None."""

    async def declare(self, entities: Iterable[Entity]) -> None:
        """Make sure that these exist.

        Raises:
            OtherArguments: where one exists with other arguments.
            UnknownQueueType: where the broker has no queues of a type.
        """

    async def exists(self, exchange: str) -> bool:
        """Return whether there is an exchange of this name; that takes no right to it."""

    async def bind(self, bindings: Iterable[Binding]) -> bool:
        """Bind what is there already; nothing happens where it is bound.

        Returns:
            False where a queue or an exchange is missing; unlike with ``declare``, the link lives.
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

        However long it takes to get there, it may while some of it moves. What is ``urgent`` does
        not wait for large messages that were published before it.

        Raises:
            Unroutable: where none is.
            QueueFull: where a queue refused it for want of room.
            LinkLost: where the outcome is unknown.
        """

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        """Begin to consume; the iterator yields until the link is lost, which raises ``LinkLost``.

        Closing the iterator ends it earlier: what was not acknowledged goes back to the queue.

        Raises:
            QueueInUse: where ``exclusive`` is asked and another consumer is there, or the other
                way.
        """

    async def get(self, queue: str) -> Delivery | None:
        """Take one message, or None where there is none."""

    async def follow(self, stream: str, *, since: Since = None) -> AsyncGenerator[Delivery]:
        """Begin to read a stream; the iterator goes on until the link is lost (``LinkLost``).

        Nothing is taken out, and what is handed out is ours at once. Entries come in the order of
        their offsets, which grow, each once.

        Args:
            stream: the queue.
            since: where to begin: at an offset; at a time, by the broker's clock, with perhaps a
                few entries from before it; None at the oldest entry that is kept.
        """

    async def newest(self, stream: str) -> Delivery | None:
        """Return the last entry of a stream; None where it is empty."""

    async def tap(self, queue: Queue, bindings: Iterable[Binding]) -> AsyncGenerator[Delivery]:
        """Make a queue for copies of the traffic and read it; the copies are ours at once.

        The queue is this link's alone and goes with the iterator or the link. ``declare`` binds it
        to more, ``unbind`` to less. It is a queue like any other to who publishes: what only a tap
        is bound for is not ``Unroutable``.
        """

    async def unbind(self, binding: Binding) -> None:
        """Undo a binding; nothing happens where it is not there."""

    async def counts(self, queue: str) -> Counts | None:
        """Count what is in a queue, changing nothing; None where there is no such queue."""

    async def purge(self, queue: str) -> int:
        """Drop what is ready in a queue; return how many messages that were."""

    async def lost(self) -> None:
        """Return when the link is lost.

        Raises:
            BrokerError: where another link would be lost in the same way: see ``Link``.
        """

    async def close(self) -> None:
        """Lose the link on purpose; nothing raises."""


class Transport(Protocol):
    """Where links come from."""

    @property
    def address(self) -> str:
        """The broker's address for messages to people, without the password."""

    async def open(self) -> Link:
        """Open a link.

        Raises:
            LinkLost: where the broker cannot be reached now; trying again is sensible.
            BrokerError: where trying again is not: refused credentials, an unknown vhost.
        """


async def tell_of_blocking(link: Link, tell: Callable[[RunEvent], object]) -> None:
    """Tell, for ever, when the broker begins to take nothing from us, and when that ends."""
    async with contextlib.aclosing(link.blocking()) as news:
        async for reason in news:
            if reason is not None:
                tell(Blocked(reason=reason))
            else:
                tell(Unblocked())
