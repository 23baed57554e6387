"""Looking at messages where they lie, taking none away.

A classic queue lets a message be taken and given back, to its very place; what remains of it is
the flag ``redelivered``, which nothing here goes by. While it is held, for milliseconds, it counts
as unacknowledged, and its reader waits for it; so a queue that is being read is left alone, but
for ``updates``, where only what the coordinator has no room for can be taken at all.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from fluffle_broker.inspect.browse import held, is_classic
from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_common.errors import UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Counts, Link

# No more is fetched once so much is held: it is held for as long as the fetching takes.
MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Peeked:
    """What was seen: ``counts`` is of before, ``readings`` are from the head on."""

    queue: str
    counts: Counts
    readings: list[DecodedMessage]


def full_name(topology: Topology, name: str) -> str:
    """Return a queue's name with its federation.

    Raises:
        UsageError: where the federation has no queue of that name.

    Example:
        >>> full_name(Topology("letters"), "inbox.w1"), full_name(Topology("a"), "a.updates")
        ('letters.inbox.w1', 'a.updates')
    """
    for full in (name, f"{topology.federation}.{name}"):
        if topology.find(full) is not None:
            return full
    raise UsageError(
        f"federation {topology.federation} has no queue '{name}'; choose updates, presence, "
        "rejected, unrouted, journal, inbox.WORKER or outbox.WORKER"
    )


async def peek(link: Link, topology: Topology, name: str, count: int) -> Peeked:
    """Read the first messages of a queue, of a stream the last ones, and leave them there.

    Args:
        link: a link of its own.
        topology: the names of the federation.
        name: the queue, with the federation or without.
        count: how many messages at most.

    Raises:
        UsageError: where there is no such queue, or it cannot be looked at without consequences.
    """
    full = full_name(topology, name)
    counts = await link.counts(full)
    if counts is None:
        raise UsageError(f"{full} does not exist{_why_not(topology, full)}")
    if full == topology.journal:
        return Peeked(full, counts, await _end_of_stream(link, topology, count))
    refusal = _refusal(topology, full, counts)
    if refusal is not None:
        raise UsageError(refusal)
    queue = topology.find(full)
    assert queue is not None
    if not await is_classic(link, queue):
        raise UsageError(
            f"{full} is not a classic queue: reading it would count as a failed delivery and "
            f"change the order of its messages; {_instead(topology)}"
        )
    async with held(link, full, count=count, most_bytes=MOST_BYTES) as each:
        deliveries = [delivery async for delivery in each]
    # Given back at once: what they say is read afterwards.
    return Peeked(full, counts, [decode_message(one, topology.federation) for one in deliveries])


async def _end_of_stream(link: Link, topology: Topology, count: int) -> list[DecodedMessage]:
    newest = await link.newest(topology.journal)
    if newest is None or newest.offset is None:
        return []
    found: list[DecodedMessage] = []
    since = max(0, newest.offset - count + 1)
    async with contextlib.aclosing(await link.follow(topology.journal, since=since)) as entries:
        async for entry in entries:
            found.append(decode_message(entry, topology.federation))
            if entry.offset is None or entry.offset >= newest.offset:
                break
    return found[-count:]


def _refusal(topology: Topology, full: str, counts: Counts) -> str | None:
    """Say why a queue must not be touched, if so; a pure decision from its name and counts."""
    instead = _instead(topology)
    if full.startswith(topology.outbox("")):
        return (
            f"{full} ({counts.ready} ready) holds parts of an update, which the coordinator "
            "counts before it fetches them: taking one out, however briefly, would look like "
            f"a loss; {instead}"
        )
    if not counts.consumers or full == topology.updates:
        return None
    inbox = topology.inbox("")
    who = f"worker {full.removeprefix(inbox)}" if full.startswith(inbox) else "the coordinator"
    return (
        f"{full} ({counts.ready} ready) is being read: {who} takes messages as they come, and "
        f"holding one back would change their order; {instead}"
    )


def _why_not(topology: Topology, full: str) -> str:
    for prefix in (topology.inbox(""), topology.outbox("")):
        if full.startswith(prefix):
            worker = full.removeprefix(prefix)
            return (
                f": worker {worker} has not been connected in the last 30 minutes, or never; "
                f"'fluffle queues --federation {topology.federation}' shows who has"
            )
    return f": nobody of federation {topology.federation} has connected to this broker yet"


def _instead(topology: Topology) -> str:
    at = f"--federation {topology.federation}"
    return f"'fluffle tap {at}' shows new messages, 'fluffle journal {at}' past events"
