"""Listing, reading, requeuing and purging rejected messages."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_broker.inspect.peek import borrowed, is_classic
from fluffle_common.errors import CAUSES, UsageError
from fluffle_common.protocol.messages import WORKER_PATTERN
from fluffle_common.protocol.topology import PRESENCE_KINDS, UPDATE_KINDS, Topology
from fluffle_common.transport.base import Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import CUT
from fluffle_common.transport.rabbitmq.management import QueueFigures

# The headers that `messaging.reject` adds, and the prefix of those that dead-lettering adds.
_ADDED = ("reason", "cause", "rejected_at", "from")
_BY_BROKER = "x-"
_DIED_IN = "x-first-death-queue"


@dataclass(frozen=True)
class Rejected:
    """A rejected message; ``number`` counts from 1, the oldest in the queue."""

    number: int
    decoded: DecodedMessage

    @property
    def reason(self) -> str:
        """Why it was rejected, in words."""
        reason = self.decoded.header("reason")
        if reason is None and self.decoded.header("x-first-death-reason") is not None:
            reason = f"RabbitMQ dropped the message ({self.decoded.header('x-first-death-reason')})"
        return str(reason or "unknown")

    @property
    def cause(self) -> str:
        """The cause, one of ``errors.CAUSES`` or ``unknown``."""
        cause = self.decoded.header("cause")
        return cause if cause in CAUSES else "unknown"  # a worker can send any text

    @property
    def rejected_at(self) -> str | None:
        """The time of the rejection in ISO 8601; None if unknown."""
        time = self.decoded.header("rejected_at")
        return str(time) if time is not None else None

    @property
    def queue(self) -> str | None:
        """The queue that it was rejected from; None if unknown."""
        # RabbitMQ's header first: the sender of a dead-lettered message may have set the other one.
        queue = self.decoded.header(_DIED_IN) or self.decoded.header("from")
        return str(queue) if queue is not None else None

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return the message as a JSON object."""
        return {
            "number": self.number,
            "reason": self.reason,
            "cause": self.cause,
            "rejected_at": self.rejected_at,
            "from": self.queue,
            **self.decoded.as_dict(now),
        }


async def list_rejected(
    link: Link, topology: Topology, *, full: int | None = None
) -> list[Rejected]:
    """Return all rejected messages without their bodies, oldest first; leave them in the queue.

    This closes ``link``. Only the message with the number ``full`` has statistics of its tensors.

    Raises:
        UsageError: if the queue does not exist, or reading it would have side effects.
    """
    count = await _count(link, topology)
    await _must_be_classic(link, topology)
    messages: list[Rejected] = []
    async with borrowed(link, topology.rejected, count=count) as deliveries:
        async for delivery in deliveries:
            number = len(messages) + 1
            decoded = decode_message(delivery, topology.federation, values=number == full)
            messages.append(Rejected(number, decoded))
            delivery.body = b""
    return messages


async def read_rejected(link: Link, topology: Topology, number: int) -> Rejected:
    """Return a rejected message in full; raise ``UsageError`` if it, or the queue, is missing."""
    messages = await list_rejected(link, topology, full=number)
    if number > len(messages):
        raise _no_such(topology, number, len(messages))
    return messages[number - 1]


@dataclass(frozen=True)
class Requeued:
    """The result for one message: its destination, or in ``left`` why it stays in the queue."""

    message: Rejected
    exchange: str = ""
    key: str = ""
    left: str | None = None


async def requeue(
    link: Link, topology: Topology, numbers: Collection[int] | None
) -> list[Requeued]:
    """Publish rejected messages again, to the queues that they were rejected from.

    A message is removed only after the broker has confirmed the new one. A crash in between
    duplicates a message but never loses it, and the coordinator recognizes duplicate updates.

    ``link`` must be used for nothing else; this closes it. ``numbers`` are those of the messages;
    None stands for all.

    Raises:
        UsageError: if one of the numbers does not exist, or returning the other messages to the
            queue would have side effects.
    """
    count = await _count(link, topology)
    if numbers is not None:
        await _must_be_classic(link, topology)
    for number in numbers or ():
        if not 1 <= number <= count:
            raise _no_such(topology, number, count)
    results: list[Requeued] = []
    number, last = 0, count if numbers is None else max(numbers, default=0)
    async with borrowed(link, topology.rejected, count=last) as deliveries:
        async for delivery in deliveries:
            number += 1
            if numbers is None or number in numbers:
                decoded = decode_message(delivery, topology.federation, values=False)
                result = await _send_again(link, topology, Rejected(number, decoded))
                results.append(result)
                if result.left is None:
                    delivery.ack()
            delivery.body = b""
    return results


async def purge(link: Link, topology: Topology) -> int:
    """Delete all rejected messages and return how many there were.

    They are acknowledged one by one, because RabbitMQ's statistics do not count purged messages,
    and ``dropped`` relies on these.
    """
    deleted = 0
    for _ in range(await _count(link, topology)):
        delivery = await link.get(topology.rejected)
        if delivery is None:
            break
        delivery.ack()
        deleted += 1
    return deleted


def destination(message: Rejected, topology: Topology) -> tuple[str, str] | None:
    """Return the exchange and the key that route a message back to its queue; None if unknown.

    The key is the one that its sender used. A message of a kind that does not belong in its queue
    goes there through the default exchange. If the queue is unknown, the kind and the worker
    determine it.
    """
    decoded = message.decoded
    queue, kind, worker = message.queue, decoded.kind, decoded.worker
    if worker is not None and not re.fullmatch(WORKER_PATTERN, worker):
        worker = None  # any text in a header, which may be too long for a routing key
    sender = _rejected_by(decoded.delivery, topology)
    if sender is not None and queue not in (topology.inbox(sender), topology.outbox(sender)):
        return None  # a worker rejects messages only from its own queues
    if decoded.header(_DIED_IN) is not None and (sender or queue != topology.updates):
        return None  # a worker's own queue may dead-letter a message in any worker's name
    by_key = {topology.updates: UPDATE_KINDS, topology.presence: PRESENCE_KINDS}
    if queue is None:
        known = worker is not None and kind in (*UPDATE_KINDS, *PRESENCE_KINDS)
        return (topology.results, f"{kind}.{worker}") if known else None
    if topology.find(queue) is None:
        return None
    if worker is not None and kind in by_key.get(queue, ()):
        return topology.results, f"{kind}.{worker}"
    if queue.startswith(topology.inbox("")):
        return topology.work, queue.removeprefix(topology.inbox(""))
    if queue.startswith(topology.outbox("")):
        return topology.results, f"part.{queue.removeprefix(topology.outbox(''))}"
    return "", queue


def dropped(figures: QueueFigures | None, kept_now: int) -> int | None:
    """Return how many messages the queue's limit has dropped; None if that is unknown.

    The number is published minus removed minus present, from RabbitMQ's statistics. These restart
    with the broker and are up to 5 seconds old, so they are used only if they agree with the
    actual number of messages.

    ``kept_now`` is the exact number of messages in the queue.
    """
    if figures is None or figures.published is None or figures.settled is None:
        return None
    if figures.ready + (figures.unacknowledged or 0) != kept_now:
        return None
    missing = figures.published - figures.settled - kept_now
    return missing if missing >= 0 else None


def _rejected_by(delivery: Delivery, topology: Topology) -> str | None:
    """Return the worker that rejected a message; None if it was the coordinator."""
    if delivery.exchange != topology.results:
        return None
    return delivery.keys[0].partition(".")[2]


async def _send_again(link: Link, topology: Topology, message: Rejected) -> Requeued:
    target = destination(message, topology)
    if target is None:
        return Requeued(message, left="its origin is unknown")
    exchange, key = target
    delivery = message.decoded.delivery
    if CUT in delivery.properties.headers:
        kept = len(delivery.body)
        return Requeued(message, left=f"only the first {kept} bytes of the message were kept")
    headers = {
        name: value
        for name, value in delivery.properties.headers.items()
        if name not in _ADDED and not name.startswith(_BY_BROKER)
    }
    try:
        properties = delivery.properties._replace(headers=headers)
        await link.publish(delivery.body, properties, exchange=exchange, keys=[key])
    except Unroutable:
        return Requeued(message, left=f"{message.queue or key} no longer exists")
    except QueueFull:
        return Requeued(message, left=f"{message.queue or key} is full")
    return Requeued(message, exchange, key)


async def _count(link: Link, topology: Topology) -> int:
    counts = await link.counts(topology.rejected)
    if counts is None:
        raise UsageError(
            f"there is no queue {topology.rejected}, because no process of federation "
            f"{topology.federation} has connected to this broker yet"
        )
    return counts.ready


async def _must_be_classic(link: Link, topology: Topology) -> None:
    queue = topology.find(topology.rejected)
    assert queue is not None
    if not await is_classic(link, queue):
        at = f"--federation {topology.federation}"
        raise UsageError(
            f"cannot list {queue.name}, because it is not a classic queue; to see what was "
            f"rejected, use 'fluffle journal {at} --kind rejected'; to send all messages again, "
            f"use 'fluffle rejected requeue --all {at}'; to delete them, use 'fluffle rejected "
            f"purge {at}'"
        )


def _no_such(topology: Topology, number: int, count: int) -> UsageError:
    remedy = f"choose 1 to {count}" if count else "the queue is empty"
    return UsageError(f"there is no message {number} in {topology.rejected}; {remedy}")
