"""Reads a federation's journal from the broker, without changing or consuming anything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from datetime import datetime, timedelta

from fluffle_common.errors import BrokerError, LinkLost, MalformedMessage, UsageError
from fluffle_common.protocol.messages import Event, Events
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import AccessRefused, Delivery, Link, Since, Transport
from fluffle_common.transport.reconnect import Backoff, reconnecting

# A stream starts at a time by the broker's clock, but events have the coordinator's clock, and are
# recorded some time before they reach the broker. So start earlier and filter.
_CLOCK_SKEW = timedelta(minutes=2)
_PATIENCE_S = 10.0  # how long to wait for an entry that the broker says is there
_POLL_S = 1.0

Waiting = Callable[[str], None]


async def read_journal(
    transport: Transport,
    topology: Topology,
    *,
    since: datetime | None = None,
    live: bool = False,
    waiting: Waiting = lambda _why: None,
    backoff: Backoff | None = None,
) -> AsyncGenerator[Event]:
    """Yield the events of a federation since a time, or all that the broker keeps, each once.

    They are in order. After a lost link, reading continues where it stopped. A ``live`` reader
    continues with new events until cancelled, and waits for a journal that does not exist yet; any
    other ends with the newest existing event. ``waiting`` is called with the reason for each wait.

    Raises:
        UsageError: if the federation has no journal.
        BrokerError: if the broker is unreachable or denies access.
    """
    newest: dict[str, int] = {}  # the highest number seen of each session, to skip duplicates
    begin: Since = since - _CLOCK_SKEW if since else None
    opened = reconnecting(transport, backoff or Backoff(), waiting)
    async with contextlib.aclosing(opened):
        async for link in opened:
            entries = _entries(link, topology, begin, live=live, waiting=waiting)
            try:
                async with contextlib.aclosing(entries):
                    async for entry in entries:
                        begin = (entry.offset or 0) + 1
                        for event in _events(entry, topology.federation):
                            if event.number <= newest.get(event.session, 0):
                                continue
                            newest[event.session] = event.number
                            if since is None or (event.moment or since) >= since:
                                yield event
                return
            except LinkLost as why:
                waiting(str(why))
            except AccessRefused as why:
                raise BrokerError(
                    f"{why.lacking}; grant the user permission to read {topology.journal}"
                ) from None


async def _entries(
    link: Link, topology: Topology, begin: Since, *, live: bool, waiting: Waiting
) -> AsyncGenerator[Delivery]:
    """Yield the entries of the stream from ``begin`` on, over one link."""
    if await link.counts(topology.journal) is None:
        missing = f"federation {topology.federation} has no journal on this broker"
        if not live:
            raise UsageError(
                f"{missing}; check that --federation is right, that the coordinator has been "
                "connected to this broker, and that the broker supports streams"
            )
        waiting(
            f"{missing} yet; to list the broker's federations, run 'fluffle queues --federation "
            f"{topology.federation}'"
        )
        while await link.counts(topology.journal) is None:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(_POLL_S)
    last: int | None = None
    if not live or isinstance(begin, int):
        newest = await link.newest(topology.journal)
        last = None if newest is None else newest.offset
        if isinstance(begin, int) and (last is None or last + 1 < begin):
            begin = None  # the broker has lost its data, and this is another stream
        if not live and (newest is None or last is None or _is_before(newest, begin)):
            return
    entries = await link.follow(topology.journal, since=begin)
    async with contextlib.aclosing(entries):
        while True:
            try:
                async with asyncio.timeout(None if live else _PATIENCE_S):
                    entry = await anext(entries)
            except TimeoutError:
                return  # by the broker's clock, the newest entry is older than ``begin``
            yield entry
            if not live and last is not None and (entry.offset or 0) >= last:
                return


def _is_before(entry: Delivery, begin: Since) -> bool:
    match begin:
        case int():
            return (entry.offset or 0) < begin
        case datetime():
            return entry.sent_at is not None and entry.sent_at < begin.timestamp()
    return False


def _events(entry: Delivery, federation: str) -> list[Event]:
    """Return the events in an entry; empty if it is not a valid message of the journal."""
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
