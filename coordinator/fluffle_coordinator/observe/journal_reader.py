"""Reading a federation's journal: from any machine, any number of times, disturbing nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from datetime import datetime, timedelta

from fluffle_common.errors import BrokerError, LinkLost, MalformedMessage, UsageError
from fluffle_common.protocol.codec import decode
from fluffle_common.protocol.messages import Event, Events
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Delivery, Link, QueueInUse, Since, Transport
from fluffle_common.transport.reconnect import Backoff, reconnecting

# The broker begins at a time by its own clock, events have the coordinator's; and an event is told
# before it is on the broker, never after.
_CLOCKS_APART = timedelta(minutes=2)
# Entries that are there come at once; a reader that was promised one and gets none gives up.
_PATIENCE_S = 10.0
_POLL_S = 1.0

Waiting = Callable[[str, float], None]


async def read_journal(
    transport: Transport,
    topology: Topology,
    *,
    since: datetime | None = None,
    live: bool = False,
    waiting: Waiting = lambda _why, _pause_s: None,
    backoff: Backoff | None = None,
) -> AsyncGenerator[Event]:
    """Yield the events of a federation in their order, each once.

    A lost link is opened again, and the reading goes on where it was.

    Args:
        transport: the way to the broker.
        topology: where the journal is.
        since: the first moment that is of interest; None for everything that is kept.
        live: go on for ever with what happens from now on, and wait for a journal that is not
            there yet; else end with what is there now.
        waiting: told why there is no link, and in how many seconds the next attempt is made.
        backoff: how to wait for a broker that is away.

    Raises:
        UsageError: where there is no journal.
        BrokerError: where there is no broker.
    """
    newest_of: dict[str, int] = {}  # of each session: its events come in the order of their numbers
    begin: Since = since - _CLOCKS_APART if since else None
    opened = reconnecting(transport, backoff or Backoff(), waiting)
    async with contextlib.aclosing(opened):
        async for link in opened:
            entries = _entries(link, topology, begin, live=live)
            try:
                async with contextlib.aclosing(entries):
                    async for entry in entries:
                        begin = (entry.offset or 0) + 1
                        for event in _events(entry, topology.federation):
                            if event.number <= newest_of.get(event.session, 0):
                                continue
                            newest_of[event.session] = event.number
                            if since is None or (event.moment or since) >= since:
                                yield event
                return
            except LinkLost as gone:
                waiting(str(gone), 0.0)
            except QueueInUse as no:
                raise BrokerError(
                    f"the broker does not let this user read the journal: {no}; it needs the right "
                    f"to read {topology.journal}"
                ) from None


async def _entries(
    link: Link, topology: Topology, begin: Since, *, live: bool
) -> AsyncGenerator[Delivery]:
    """Yield what is in the stream from ``begin`` on, over one link."""
    while await link.counts(topology.journal) is None:
        if not live:
            raise UsageError(
                f"federation {topology.federation} has no journal on this broker; "
                "is --federation right, has its coordinator ever been connected here, and does the "
                "broker have streams?"
            )
        await asyncio.sleep(_POLL_S)
    last: int | None = None
    if not live:
        newest = await link.newest(topology.journal)
        if newest is None or newest.offset is None or _is_before(newest, begin):
            return
        last = newest.offset
    entries = await link.follow(topology.journal, since=begin)
    async with contextlib.aclosing(entries):
        while True:
            try:
                async with asyncio.timeout(None if live else _PATIENCE_S):
                    entry = await anext(entries)
            except TimeoutError:
                return  # by the broker's clock, what is newest is from before ``begin``
            yield entry
            if last is not None and (entry.offset or 0) >= last:
                return


def _is_before(entry: Delivery, begin: Since) -> bool:
    match begin:
        case int():
            return (entry.offset or 0) < begin
        case datetime():
            return entry.sent_at is not None and entry.sent_at < begin.timestamp()
    return False


def _events(entry: Delivery, federation: str) -> list[Event]:
    """Return the events in an entry; none where somebody has put anything else there."""
    try:
        message, _ = decode(entry.body, federation)
    except MalformedMessage:
        return []
    match message:
        case Event():
            return [message]
        case Events():
            return message.each()
    return []
