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
from collections import deque
from collections.abc import Sequence
from typing import Any

from fluffle_common.cli.console import warn
from fluffle_common.errors import FluffleError
from fluffle_common.protocol.events import Gap, RunEvent
from fluffle_common.protocol.messages import Event, EventRecord, Events
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import encode
from fluffle_common.transport.base import (
    HeaderValue,
    Link,
    Properties,
    QueueFull,
    QueueInUse,
    Unroutable,
)
from fluffle_coordinator.observe.journal_entries import Entries
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

    Beyond ``capacity`` waiting events, the oldest are dropped.
    """

    def __init__(self, topology: Topology, *, capacity: int = _CAPACITY) -> None:
        self._topology, self._entries = topology, Entries()
        self._unsent: deque[EventRecord] = deque(maxlen=capacity)
        self._window: list[EventRecord] = []
        self._next_number = 1  # of the first event in the window
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
        record = self._entries.record_of(event)
        if record is None or self._broken:
            return
        if len(self._unsent) == self._unsent.maxlen:
            self._dropped += 1  # append() removes the oldest
        self._unsent.append(record)
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
            await asyncio.Event().wait()  # until cancelled
        try:
            await self._publish(link)
        except (FluffleError, QueueInUse):  # the coordinator, which owns the link, handles these
            raise
        except Exception as wrong:
            self._broken = True
            self._unsent.clear()
            self._window = []
            warn(
                f"the journal cannot be published ({wrong!r}); the run continues without a journal"
            )
            await asyncio.Event().wait()  # until cancelled

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
                self._next_number += len(self._window)
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
        """Take the next events, after a ``gap`` if some were dropped."""
        if self._dropped and self._unsent:
            gap = {"event": Gap.name, "fields": Gap(dropped=self._dropped).fields()}
            self._window.append(self._unsent[0].model_copy(update=gap))
            self._dropped = 0
        while self._unsent and len(self._window) < _WINDOW:
            self._window.append(self._unsent.popleft())

    async def _send_window(self, link: Link) -> None:
        """Publish the window in order, and wait for all confirms together."""
        messages = self._messages()
        outcomes = await asyncio.gather(
            *(self._send(link, message) for message in messages), return_exceptions=True
        )
        dropped = 0
        for message, outcome in zip(messages, outcomes, strict=True):
            if isinstance(outcome, QueueFull | Unroutable):  # the broker has no room for it
                dropped += _number_of_events(message)
            elif outcome is not None:
                raise outcome  # the next link is sent the whole window
        self._dropped += dropped

    def _messages(self) -> Sequence[Event | Events]:
        """Return the events of the window: one message each, or all in one."""
        ids: dict[str, Any] = {
            "federation": self._topology.federation,
            "session": self._entries.session,
        }
        first = self._next_number
        if len(self._window) > _FEW:
            return [Events(**ids, number=first, events=tuple(self._window))]
        return [
            Event(**ids, number=number, **dict(record))
            for number, record in enumerate(self._window, start=first)
        ]

    async def _send(self, link: Link, message: Event | Events) -> None:
        headers: dict[str, HeaderValue] = {}
        if isinstance(message, Event):
            headers["event"] = message.event
            for name in ("round", "worker"):
                if isinstance(message.fields.get(name), str | int):
                    headers[name] = message.fields[name]
        else:
            headers["events"] = len(message.events)
        properties = Properties(type=message.kind, message_id=message.identity, headers=headers)
        await link.publish(encode(message), properties, exchange="", keys=[self._topology.journal])

    async def drained(self, within_s: float) -> None:
        """At the end of a run, wait until the broker has every event.

        Returns early if there is no link, or after ``within_s`` seconds.
        """
        self._ending.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._at_rest.wait()


def _number_of_events(message: Event | Events) -> int:
    """Return how many events are missing without this message: those of its gaps too."""
    records: Sequence[EventRecord | Event] = (
        message.events if isinstance(message, Events) else (message,)
    )
    return sum(each.fields["dropped"] if each.event == Gap.name else 1 for each in records)
