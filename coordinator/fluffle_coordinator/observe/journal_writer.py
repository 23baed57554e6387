"""Publishes every event of a run to the journal, a stream that anyone may read at any time.

Events are queued at once and published by a separate task, so that a slow or unreachable broker
never delays a round::

    record() ──> unsent (bounded) ──> window (published, unconfirmed) ──confirms──> done
                                     └──link lost: published again over the next link

An event keeps its identity (session and number) however often it is published, so readers can skip
duplicates. If too many events wait, the oldest are dropped, and a ``gap`` event gives their number.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Callable

from fluffle_common.cli.console import warn
from fluffle_common.clock import timestamp
from fluffle_common.errors import FluffleError
from fluffle_common.protocol.codec import encode
from fluffle_common.protocol.events import Gap, RunEvent
from fluffle_common.protocol.messages import Event, Events
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import (
    HeaderValue,
    Link,
    Properties,
    QueueFull,
    QueueInUse,
    Unroutable,
)
from fluffle_coordinator.observe.journal_entries import Entries, Entry
from fluffle_coordinator.observe.watchers import Watcher

_CAPACITY = 10_000  # a busy federation's events of some hours, a few megabytes
# How long an event may wait for others: batches cost the coordinator and the broker much less.
_GATHER_S = 0.1
_WINDOW = 500  # the most unconfirmed events
# Up to this many events become one message each, which is readable in RabbitMQ's own UI. More are
# packed into a single message, which is much cheaper.
_FEW = 8


class Journal(Watcher):
    """A watcher that publishes every event.

    Args:
        topology: the names of the federation's queues and exchanges.
        capacity: the number of waiting events beyond which the oldest are dropped.
        now: returns the time in UTC as ISO 8601.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        capacity: int = _CAPACITY,
        now: Callable[[], str] = timestamp,
    ) -> None:
        self._topology, self._entries = topology, Entries(now)
        self._session, self._number = uuid.uuid4().hex[:12], 0
        self._unsent: deque[Entry] = deque(maxlen=capacity)
        self._window: list[Event] = []
        self._dropped = 0
        self._not_empty = asyncio.Event()
        self._at_rest = asyncio.Event()  # set while there is nothing to send, or no link
        self._at_rest.set()
        self._ending = asyncio.Event()
        self._linked = False
        self._broken = False

    # --- recording -----------------------------------------------------------------------------

    def record(self, event: RunEvent) -> None:
        """Queue an event for publishing."""
        entry = self._entries.entry_of(event)
        if entry is None or self._broken:
            return
        if len(self._unsent) == self._unsent.maxlen:
            self._dropped += 1  # append() removes the oldest
        self._unsent.append(entry)
        if self._linked:
            self._at_rest.clear()
        self._not_empty.set()

    # --- publishing ----------------------------------------------------------------------------

    async def publish(self, link: Link) -> None:
        """Publish past and new events over a link until cancelled.

        Events that are unconfirmed by then are published again over the next link. An error that is
        not the link's stops the journal, but never the run.

        Raises:
            LinkLost: if the link is lost while an event is unconfirmed.
        """
        if self._broken:
            return await _forever()
        try:
            await self._publish(link)
        except (FluffleError, QueueInUse):  # the coordinator, which owns the link, handles these
            raise
        except Exception as wrong:
            self._broken = True
            self._unsent.clear()
            self._window = []
            warn(f"the journal cannot be published ({wrong!r}); the run goes on without it")
            await _forever()

    async def _publish(self, link: Link) -> None:
        self._linked = True
        if self._window or self._unsent:
            self._at_rest.clear()
        try:
            while True:
                if not self._window:
                    await self._gather()
                    self._fill_window()
                await self._send_window(link)
                self._window = []
        finally:
            self._linked = False
            self._at_rest.set()

    async def _gather(self) -> None:
        """Wait for an event, and then a moment for others, so that they are sent together.

        A full window is sent at once, and so is everything at the end of a run.
        """
        if not self._unsent:
            self._at_rest.set()
            self._not_empty.clear()
            await self._not_empty.wait()
        if len(self._unsent) >= _WINDOW:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_S):
                await self._ending.wait()

    def _fill_window(self) -> None:
        """Number the next events, after a ``gap`` if some were dropped."""
        if self._dropped and self._unsent:
            first = self._unsent[0]
            gap = Entry(Gap.name, first.time, first.run, Gap(dropped=self._dropped).fields())
            self._window.append(self._numbered(gap))
            self._dropped = 0
        while self._unsent and len(self._window) < _WINDOW:
            self._window.append(self._numbered(self._unsent.popleft()))

    def _numbered(self, unsent: Entry) -> Event:
        self._number += 1
        return Event(
            federation=self._topology.federation,
            event=unsent.name,
            time=unsent.time,
            session=self._session,
            number=self._number,
            run=unsent.run,
            fields=dict(unsent.fields),
        )

    async def _send_window(self, link: Link) -> None:
        """Publish the window in order, and wait for all confirms together."""
        events = self._window
        batches = [[event] for event in events] if len(events) <= _FEW else [events]
        outcomes = await asyncio.gather(
            *(self._send(link, batch) for batch in batches), return_exceptions=True
        )
        for batch, outcome in zip(batches, outcomes, strict=True):
            if isinstance(outcome, QueueFull | Unroutable):  # the broker has no room for them
                self._dropped += sum(
                    event.fields["dropped"] if event.event == Gap.name else 1 for event in batch
                )
            elif outcome is not None:
                raise outcome

    async def _send(self, link: Link, batch: list[Event]) -> None:
        body, entry = _packed(batch)
        headers: dict[str, HeaderValue] = {}
        if isinstance(entry, Event):
            headers["event"] = entry.event
            for name in ("round", "worker"):
                if isinstance(entry.fields.get(name), str | int):
                    headers[name] = entry.fields[name]
        else:
            headers["events"] = len(batch)
        properties = Properties(type=entry.kind, message_id=entry.identity, headers=headers)
        await link.publish(body, properties, exchange="", keys=[self._topology.journal])

    async def drained(self, within_s: float) -> None:
        """At the end of a run, wait until the broker has every event.

        Returns early if there is no link, or after ``within_s`` seconds.
        """
        self._ending.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._at_rest.wait()


async def _forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


def _packed(batch: list[Event]) -> tuple[bytes, Event | Events]:
    entry = _entry(batch)
    try:
        return encode(entry), entry
    except (TypeError, ValueError, OverflowError):  # a value that msgpack cannot encode
        entry = _entry([_encodable(event) for event in batch])
        return encode(entry), entry


def _entry(batch: list[Event]) -> Event | Events:
    first, *more = batch
    if not more:
        return first
    return Events(
        federation=first.federation,
        session=first.session,
        number=first.number,
        events=tuple(batch),  # numbered consecutively, so the first number is enough
    )


def _encodable(event: Event) -> Event:
    """Return an event as it is, or with its fields as text if msgpack cannot encode them."""
    try:
        encode(event)
    except (TypeError, ValueError, OverflowError):
        texts = {name: repr(value)[:2000] for name, value in event.fields.items()}
        return event.model_copy(update={"fields": texts})
    return event
