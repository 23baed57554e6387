"""A worker's connection to the broker, reopened when lost, with its queues and their messages."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost, MalformedMessage, RefusedError
from fluffle_common.protocol import events
from fluffle_common.protocol.messages import Message
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import Delivery, Link, QueueInUse, Transport, report_blocking
from fluffle_common.transport.fetch_parts import read_part
from fluffle_common.transport.reconnect import reconnecting
from fluffle_worker.heartbeat import Presence
from fluffle_worker.inbox import Record, Refusals, check_message
from fluffle_worker.settings import WorkerSettings

_INBOX_PREFETCH = 8
_STILL_OCCUPIED = "waiting until the broker releases this worker's earlier connection"
_WAITING_EVERY_S = 15.0
# Without use, the inbox and a classic outbox expire after half an hour.
_RENEW_EVERY_S = 600.0
# How long the parts of an update wait for the coordinator to bind a new outbox.
_BOUND_WITHIN_S = 10.0
# Interval between checks for the shared exchanges, which the coordinator declares.
_LOOK_AGAIN_S = 0.5, 5.0  # at first, and at most


class Connection:
    """Keeps a link open and does everything that runs while there is one.

    It calls ``opened`` for each new link, before it reads the first message, and ``receive`` with
    each message and its payload; if that raises ``MalformedMessage``, the message is rejected.
    ``joined`` returns whether a coordinator has answered yet.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        presence: Presence,
        *,
        transport: Transport,
        topology: Topology,
        record: Record,
        opened: Callable[[], object],
        receive: Callable[[Link, Message, memoryview], Awaitable[object]],
        joined: Callable[[], bool],
    ) -> None:
        self._settings, self._presence = settings, presence
        self._transport, self._topology = transport, topology
        self._record, self._opened = record, opened
        self._receive, self._joined = receive, joined
        self._refusals = Refusals(topology, settings.worker, record)
        self._linked = asyncio.Event()
        self._outbox_bound = asyncio.Event()  # cleared while our outbox is newer than its binding
        self._outbox_bound.set()
        self.current: Link | None = None

    async def link(self) -> Link:
        """Return the current link, waiting for one if necessary."""
        while self.current is None:
            await self._linked.wait()
        return self.current

    async def run(self) -> None:
        """Keep a link open until cancelled.

        Raises:
            RefusedError: if the broker or the coordinator refuses this worker.
            BrokerError: if the broker stays unreachable for too long.
        """

        def no_broker(reason: str) -> None:
            self._record(events.NoBroker(address=self._transport.address, reason=reason))

        first, occupied_since = True, 0.0
        async with contextlib.aclosing(
            reconnecting(self._transport, self._settings.backoff, no_broker)
        ) as opened:
            async for link in opened:
                try:
                    await self._serve(link, first=first)
                except QueueInUse:
                    now = time.monotonic()
                    if not occupied_since:
                        self._record(
                            events.Occupied(pause_s=self._settings.occupied_s)
                            if first
                            else events.Waiting(reason=_STILL_OCCUPIED, what="connection")
                        )
                    occupied_since = occupied_since or now
                    # Later on, assume that it is this worker's own broken connection, and wait.
                    if first and now - occupied_since >= self._settings.occupied_s:
                        raise RefusedError(
                            f"another worker with the ID '{self._settings.worker}' is connected to "
                            f"federation {self._settings.federation}; stop the other worker or, "
                            "if the two have different data, start this one with another --id"
                        ) from None
                except LinkLost as gone:
                    self._record(
                        events.Disconnected(address=self._transport.address, reason=str(gone))
                    )
                finally:
                    if self.current is not None:  # otherwise, the inbox has not been emptied
                        first, occupied_since = False, 0.0
                    self.current = None
                    self._linked.clear()

    async def renew_queues(self, link: Link) -> None:
        """Declare our queues again, and have the coordinator bind an outbox that had expired.

        The inbox never expires, because it has a consumer.
        """
        if await self._declare_queues(link):
            await self._presence.greet(link)

    async def ready_outbox(self, link: Link) -> None:
        """Renew the queues, and empty the outbox of parts of earlier answers.

        A new outbox gets nothing before it is bound. The wait for that is limited, since a
        coordinator asks again for an update whose parts are missing.
        """
        await self.renew_queues(link)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BOUND_WITHIN_S):
                await self._outbox_bound.wait()
        await self._refusals.drain(link, self._topology.outbox(self._settings.worker), read_part)

    def welcomed(self) -> None:
        """Note that a coordinator has answered, which binds our queues before it does."""
        self._outbox_bound.set()

    async def _declare_queues(self, link: Link) -> bool:
        """Declare our queues; return whether the outbox was missing."""
        worker = self._settings.worker
        missing = await link.counts(self._topology.outbox(worker)) is None
        if missing:
            self._outbox_bound.clear()
        await link.declare(self._topology.queues_of(worker))
        return missing

    async def _serve(self, link: Link, *, first: bool) -> None:
        inbox = self._topology.inbox(self._settings.worker)
        await self._declare_queues(link)
        if first:  # empty the inbox of messages for an earlier process of this worker
            counts = await link.counts(inbox)
            if counts is not None and not counts.consumers:  # otherwise, it is in use
                await self._refusals.drain(link, inbox, check_message)
        # Over a slow line, an answer would wait behind the messages in the inbox.
        created = await link.exists(self._topology.results)
        messages = await link.consume(inbox, prefetch=_INBOX_PREFETCH, exclusive=True)
        self._opened()
        self.current = link
        self._linked.set()
        self._record(events.Connected(address=self._transport.address))
        await run_all(
            self._read(link, messages),
            self._send_heartbeats(link, created=created),
            _until_lost(link),
            self._report_waiting(link),
            self._keep_queues(link),
            report_blocking(link, self._record),
        )

    async def _read(self, link: Link, messages: AsyncIterator[Delivery]) -> None:
        async for delivery in messages:
            try:
                message, payload = decode(delivery.body, self._settings.federation)
                await self._receive(link, message, payload)
            except MalformedMessage as wrong:
                await self._refusals.refuse(link, delivery, wrong)
            else:
                delivery.ack()

    async def _send_heartbeats(self, link: Link, *, created: bool) -> None:
        """Send heartbeats as soon as a coordinator has created the exchange that they go to."""
        if not created:
            self._record(events.Alone(federation=self._settings.federation))
        pause_s, most_s = _LOOK_AGAIN_S
        while not created:
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, most_s)  # the broker logs each look as a channel error
            created = await link.exists(self._topology.results)
        await self._presence.signs_of_life(link)

    async def _keep_queues(self, link: Link) -> None:
        """Declare our queues from time to time, which keeps them from expiring."""
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            await self.renew_queues(link)

    async def _report_waiting(self, link: Link) -> None:
        """Report that no coordinator answers, unless the broker, which is reported, is why."""
        began = time.monotonic()
        while not self._joined():
            await asyncio.sleep(_WAITING_EVERY_S)
            if not self._joined() and link.blocking.reason is None:
                reason = (
                    f"no coordinator of federation {self._settings.federation} has answered for "
                    f"{time.monotonic() - began:.0f} s; start it at any time, or correct "
                    "--federation"
                )
                self._record(events.Waiting(reason=reason, what="coordinator"))


async def _until_lost(link: Link) -> None:
    await link.lost()
    raise LinkLost("the connection was closed")
