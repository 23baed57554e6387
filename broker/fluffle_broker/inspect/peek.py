"""Peeking at the messages of a queue without removing them.

A classic queue puts a returned message back at its old position. The only trace is the flag
``redelivered``, on which nothing in fluffle depends. While messages are held, for milliseconds,
they are unacknowledged and withheld from the queue's consumer. A queue with a consumer is therefore
refused, except ``updates``: the coordinator has prefetched all it wants, and only what is left in
the queue can be taken.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from fluffle_broker.inspect.browse import borrowed, is_classic
from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_common.errors import UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Counts, Link

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
        UsageError: if the federation has no queue of that name.

    Example:
        >>> full_name(Topology("letters"), "inbox.w1"), full_name(Topology("a"), "a.updates")
        ('letters.inbox.w1', 'a.updates')
    """
    for full in (name, f"{topology.federation}.{name}"):
        if topology.find(full) is not None:
            return full
    raise UsageError(
        f"federation {topology.federation} has no queue '{name}'; choose updates, presence, "
        "rejected, unrouted, journal or inbox.WORKER"
    )


async def peek(link: Link, topology: Topology, name: str, count: int) -> Peeked:
    """Read the first messages of a queue, or the last entries of a stream, and leave them there.

    ``link`` must be used for nothing else.

    Raises:
        UsageError: if there is no such queue, or reading it would have side effects.
    """
    full = full_name(topology, name)
    counts = await link.counts(full)
    if counts is None:
        raise UsageError(f"queue {full} does not exist, because {_why_not(topology, full)}")
    if full == topology.journal:
        return Peeked(full, counts, await _end_of_stream(link, topology, count))
    refusal = _refusal(topology, full, counts)
    if refusal is not None:
        raise UsageError(refusal)
    queue = topology.find(full)
    assert queue is not None
    if not await is_classic(link, queue):
        raise UsageError(
            f"cannot peek at {full}, because reading it would change the order of its messages "
            f"(it is not a classic queue); {_instead(topology)}"
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


def _refusal(topology: Topology, full: str, counts: Counts) -> str | None:
    """Return why a queue must not be read, judging from its name and counts; None if it may."""
    instead = _instead(topology)
    if full.startswith(topology.outbox("")):
        return (
            f"cannot peek at {full} ({counts.ready} ready), because the coordinator would treat "
            f"the parts that 'peek' takes out as lost; {instead}"
        )
    if not counts.consumers or full == topology.updates:
        return None
    inbox = topology.inbox("")
    who = f"worker {full.removeprefix(inbox)}" if full.startswith(inbox) else "the coordinator"
    return (
        f"cannot peek at {full} ({counts.ready} ready) while it is being read by {who}, because "
        f"'peek' would change the order of the messages; {instead}"
    )


def _why_not(topology: Topology, full: str) -> str:
    for prefix in (topology.inbox(""), topology.outbox("")):
        if full.startswith(prefix):
            worker = full.removeprefix(prefix)
            return (
                f"worker {worker} has not connected in the last 30 minutes; list the connected "
                f"workers with 'fluffle queues --federation {topology.federation}'"
            )
    return f"no process of federation {topology.federation} has connected to this broker yet"


def _instead(topology: Topology) -> str:
    at = f"--federation {topology.federation}"
    return f"use 'fluffle tap {at}' for new messages, or 'fluffle journal {at}' for past events"
