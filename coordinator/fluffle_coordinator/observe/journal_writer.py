"""The journal: every event of a run, published to a stream that anyone may read at any time.

What happens is noted at once and published by a task of its own, so that neither a slow broker nor
one that is away ever holds up a round::

    record() ──> unsent (bounded) ──> window (on its way, unconfirmed) ──confirms──> done
                                     └──the link is lost: sent again over the next one

An event goes out under the same identity however often it is sent; whoever reads passes over what
came twice. When what cannot be sent becomes too much, the oldest go, and one event,
``gap``, says how many.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fluffle_common.cli.console import warn
from fluffle_common.clock import timestamp
from fluffle_common.errors import FluffleError
from fluffle_common.protocol.codec import encode
from fluffle_common.protocol.events import (
    Gap,
    Resumed,
    RunEvent,
    Standby,
    Started,
    Waiting,
)
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
from fluffle_coordinator.observe.watchers import Watcher

# Some hours of a busy federation without a broker, a few megabytes.
_CAPACITY = 10_000
# How long an event may wait for others: a few sent together cost the coordinator and the broker
# much less than the same ones one by one.
_GATHER_S = 0.1
# How many may be on their way to the broker, unconfirmed.
_WINDOW = 500
# So many go out one by one, as people can read them in the broker's own pages; more go out as one
# message, which costs the coordinator and the broker much less.
_FEW = 8
# The address of the broker is no news to anyone who reads there.
_NOT_KEPT = "address"
_NOTHING = object()


class _Noted(NamedTuple):
    """An event as it happened; it gets its number when its turn comes."""

    name: str
    time: str
    run: str | None
    fields: Mapping[str, Any]


class Journal(Watcher):
    """A watcher that publishes every event.

    Args:
        topology: where the stream is.
        capacity: how many events may wait for a link before the oldest are dropped.
        now: the time, UTC, as ISO 8601.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        capacity: int = _CAPACITY,
        now: Callable[[], str] = timestamp,
    ) -> None:
        self._topology, self._now = topology, now
        self._session, self._number = uuid.uuid4().hex[:12], 0
        self._run: str | None = None
        self._unsent: deque[_Noted] = deque(maxlen=capacity)
        self._window: list[Event] = []
        self._dropped = 0
        self._lasting: dict[str, object] = {}
        self._news = asyncio.Event()
        self._at_rest = asyncio.Event()  # there is nothing to send, or no link to send it over
        self._at_rest.set()
        self._ending = asyncio.Event()
        self._linked = False
        self._broken = False

    # --- what comes in -------------------------------------------------------------------------

    def record(self, event: RunEvent) -> None:
        """See ``Watcher``."""
        if isinstance(event, Started | Resumed) and event.run:
            self._run = event.run
        if self._broken or not event.journalled or self._is_old_news(event):
            return
        if len(self._unsent) == self._unsent.maxlen:
            self._dropped += 1  # the deque lets go of its oldest
        fields = event.fields()
        fields.pop(_NOT_KEPT, None)
        self._unsent.append(_Noted(event.name, self._now(), self._run, fields))
        if self._linked:
            self._at_rest.clear()
        self._news.set()

    def _is_old_news(self, event: RunEvent) -> bool:
        """Whether this is told again while it lasts, and nothing about it has changed."""
        if not isinstance(event, Waiting | Standby):
            return False
        gist = event.gist()
        before, self._lasting[event.name] = self._lasting.get(event.name, _NOTHING), gist
        return gist == before

    # --- what goes out -------------------------------------------------------------------------

    async def publish(self, link: Link) -> None:
        """Send over this link what has happened and happens, until cancelled.

        What was not confirmed by then is sent again over the next link. An error that is about the
        journal and not about the link ends the journal, never the run that it tells of.

        Raises:
            LinkLost: where the link is lost while something is on its way.
        """
        if self._broken:
            return await _for_ever()
        try:
            await self._publish(link)
        except (
            FluffleError,
            QueueInUse,
        ):  # of the link, or the broker's refusal: whoever has the link decides
            raise
        except Exception as wrong:
            self._broken = True
            self._unsent.clear()
            self._window = []
            warn(f"the journal cannot be published ({wrong!r}); the run goes on without it")
            await _for_ever()

    async def _publish(self, link: Link) -> None:
        self._linked = True
        if self._window or self._unsent:
            self._at_rest.clear()
        try:
            while True:
                if not self._window:
                    await self._gather()
                    self._fill_window()
                # All at once, in order: a publish waits for its confirm, not for the one before.
                await self._confirmed(link, self._window)
                self._window = []
        finally:
            self._linked = False
            self._at_rest.set()

    async def _gather(self) -> None:
        """Wait for news, and for what follows at once, so that it goes out in one go.

        At the end of a run, nothing is waited for; nor is it where there is enough for one go.
        """
        if not self._unsent:
            self._at_rest.set()
            self._news.clear()
            await self._news.wait()
        if len(self._unsent) >= _WINDOW:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_S):
                await self._ending.wait()

    def _fill_window(self) -> None:
        """Take up what is next."""
        if self._dropped and self._unsent:
            first = self._unsent[0]
            gap = _Noted(Gap.name, first.time, first.run, Gap(dropped=self._dropped).fields())
            self._window.append(self._numbered(gap))
            self._dropped = 0
        while self._unsent and len(self._window) < _WINDOW:
            self._window.append(self._numbered(self._unsent.popleft()))

    def _numbered(self, noted: _Noted) -> Event:
        self._number += 1
        return Event(
            federation=self._topology.federation,
            event=noted.name,
            time=noted.time,
            session=self._session,
            number=self._number,
            run=noted.run,
            fields=dict(noted.fields),
        )

    async def _confirmed(self, link: Link, events: list[Event]) -> None:
        batches = [[event] for event in events] if len(events) <= _FEW else [events]
        outcomes = await asyncio.gather(
            *(self._send(link, batch) for batch in batches), return_exceptions=True
        )
        for batch, outcome in zip(batches, outcomes, strict=True):
            if isinstance(outcome, QueueFull | Unroutable):  # the run goes on without its journal
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
        """Return when the broker has every event, or there is no link, or time is up.

        It is for the end of a run: from now on, everything goes out at once.
        """
        self._ending.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._at_rest.wait()


async def _for_ever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


def _packed(batch: list[Event]) -> tuple[bytes, Event | Events]:
    entry = _entry(batch)
    try:
        return encode(entry), entry
    except (TypeError, ValueError, OverflowError):  # a value that msgpack has no word for
        entry = _entry([_sayable(event) for event in batch])
        return encode(entry), entry


def _entry(batch: list[Event]) -> Event | Events:
    first, *more = batch
    if not more:
        return first
    return Events(
        federation=first.federation,
        session=first.session,
        number=first.number,
        events=tuple(batch),  # of each, what happened; its number follows from its place
    )


def _sayable(event: Event) -> Event:
    try:
        encode(event)
    except (TypeError, ValueError, OverflowError):
        words = {name: repr(value)[:2000] for name, value in event.fields.items()}
        return event.model_copy(update={"fields": words})
    return event
