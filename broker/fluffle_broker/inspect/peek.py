"""Peeking at the messages of a queue without removing them.

A classic queue puts a returned message back at its old position. The only trace is the flag
``redelivered``, on which nothing in fluffle depends. While messages are held, for milliseconds,
they are unacknowledged and withheld from the queue's consumer. A queue with a consumer is therefore
refused, except ``updates``: the coordinator has prefetched all it wants, and only what is left in
the queue can be taken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_common.errors import UsageError
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.base import Counts, Delivery, Link, OtherArguments

# Fetching stops at this total size, since messages are held for as long as fetching takes.
MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Peeked:
    """The messages from the head of a queue, and its counts before they were taken."""

    queue: str
    counts: Counts
    messages: list[DecodedMessage]


def full_name(topology: Topology, name: str) -> str:
    """Return the full name of a queue, with its federation.

    Raises:
        UsageError: if the federation has no such queue, or it cannot be peeked at.

    Example:
        >>> full_name(Topology("letters"), "inbox.w1"), full_name(Topology("a"), "a.updates")
        ('letters.inbox.w1', 'a.updates')
    """
    for full in (name, f"{topology.federation}.{name}"):
        # The coordinator would take parts that are missing from an outbox for lost.
        if topology.find(full) is not None and not full.startswith(topology.outbox("")):
            return full
    raise UsageError(
        f"cannot peek at '{name}' of federation {topology.federation}; choose updates, presence, "
        "rejected, unrouted, journal or inbox.WORKER"
    )


async def peek(link: Link, topology: Topology, name: str, count: int) -> Peeked:
    """Read the first messages of a queue, or the last entries of a stream, and leave them there.

    ``link`` must be used for nothing else; this closes it.

    Raises:
        UsageError: if there is no such queue, or reading it would have side effects.
    """
    full = full_name(topology, name)
    counts = await link.counts(full)
    if counts is None:
        raise UsageError(f"queue {full} does not exist, because {_why_not(topology, full)}")
    if full == topology.journal:
        return Peeked(full, counts, await _end_of_stream(link, topology, count))
    if obstacle := await _obstacle(link, topology, full, counts):
        at = f"--federation {topology.federation}"
        raise UsageError(
            f"cannot peek at {full} ({counts.ready} ready), because {obstacle} and 'peek' would "
            f"change the order of its messages; use 'fluffle tap {at}' for new messages, or "
            f"'fluffle journal {at}' for past events"
        )
    async with borrowed(link, full, count=count, most_bytes=MOST_BYTES) as messages:
        deliveries = [delivery async for delivery in messages]
    # Decoded only after they are returned, to hold them as briefly as possible.
    return Peeked(full, counts, [decode_message(one, topology.federation) for one in deliveries])


async def _end_of_stream(link: Link, topology: Topology, count: int) -> list[DecodedMessage]:
    newest = await link.newest(topology.journal)
    if newest is None or newest.offset is None:
        return []
    messages: list[DecodedMessage] = []
    since = max(0, newest.offset - count + 1)
    async with contextlib.aclosing(await link.follow(topology.journal, since=since)) as entries:
        async for entry in entries:
            messages.append(decode_message(entry, topology.federation))
            if entry.offset is None or entry.offset >= newest.offset:
                break
    return messages[-count:]


async def _obstacle(link: Link, topology: Topology, full: str, counts: Counts) -> str | None:
    """Return why a queue must not be read; None if it may."""
    if counts.consumers and full != topology.updates:
        inbox = topology.inbox("")
        who = f"worker {full.removeprefix(inbox)}" if full.startswith(inbox) else "the coordinator"
        return f"it is being read by {who}"
    queue = topology.find(full)
    assert queue is not None
    return None if await is_classic(link, queue) else "it is not a classic queue"


def _why_not(topology: Topology, full: str) -> str:
    inbox = topology.inbox("")
    if full.startswith(inbox):
        return (
            f"worker {full.removeprefix(inbox)} has not connected in the last 30 minutes; list the "
            f"connected workers with 'fluffle queues --federation {topology.federation}'"
        )
    return f"no process of federation {topology.federation} has connected to this broker yet"


async def is_classic(link: Link, queue: Queue) -> bool:
    """Return whether an existing queue is a classic queue, as ``queue`` describes it.

    Only a classic queue takes a message back without side effects. A quorum queue counts a failed
    delivery, moves the message to its end, and drops it after several of these. AMQP reveals the
    type of a queue only through a second declaration, which changes nothing if all arguments agree
    and loses the link otherwise.

    Raises:
        BrokerError: if the user may not declare (configure) the queue.
    """
    try:
        await link.declare([queue])
    except OtherArguments:
        return False
    return True


@contextlib.asynccontextmanager
async def borrowed(
    link: Link, queue: str, *, count: int, most_bytes: float = math.inf
) -> AsyncGenerator[AsyncIterator[Delivery]]:
    """Take messages from the head of a queue, and return each to its position on exit.

    ``link`` must be used for nothing else; its end returns the messages. The iterator takes one
    message at a time. The caller may drop a body that it no longer needs, and acknowledge a
    message that is not to return. Once the messages have ``most_bytes`` in total, no more are
    taken.
    """

    async def each() -> AsyncIterator[Delivery]:
        taken = size = 0
        while taken < count and size < most_bytes:
            delivery = await link.get(queue)
            if delivery is None:
                return
            taken += 1
            size += len(delivery.body)
            yield delivery

    try:
        yield each()
    finally:
        # Not one by one: RabbitMQ tells the next command how many messages are ready before it
        # handles the returns that are still in its own queue, so that some would be missing.
        await link.close()
