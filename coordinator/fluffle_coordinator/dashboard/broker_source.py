"""The page of a federation whose coordinator runs anywhere, as the broker tells it.

Three sources: the journal (every event, from the oldest that is kept), copies of the workers' signs
of life, and RabbitMQ's management API. All three only read; the coordinator notices nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
import uuid
from collections.abc import Callable

from fluffle_common.concurrency import run_all
from fluffle_common.errors import BrokerError, LinkLost, MalformedMessage
from fluffle_common.protocol.codec import decode
from fluffle_common.protocol.events import Left, from_fields
from fluffle_common.protocol.messages import Bye, Heartbeat, Hello
from fluffle_common.protocol.topology import Binding, Topology
from fluffle_common.transport.base import Delivery, Link, QueueInUse, Transport
from fluffle_common.transport.reconnect import Backoff, reconnecting
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.feed import Feed, Figures
from fluffle_coordinator.dashboard.server import served
from fluffle_coordinator.observe.journal_reader import read_journal

_FOREVER = Backoff(give_up_s=math.inf)
_KINDS = ("hello", "heartbeat", "bye")
_NOBODY_YET_S = 2.0


class BrokerSource:
    """Follows a federation through the broker, and keeps a board of it.

    Args:
        topology: the names of the federation.
        transport: the way to the broker.
        ask_queues: asks for the figures of the queues; see ``Feed``.
    """

    def __init__(
        self, topology: Topology, transport: Transport, ask_queues: Callable[[], Figures]
    ) -> None:
        self._topology, self._transport = topology, transport
        self._board = Board(topology.federation, source="journal")
        self.feed = Feed(self._board, ask_queues=ask_queues)

    async def serve(self, listening: socket.socket) -> None:
        """Show the page until cancelled; a broker that is away is waited for.

        Raises:
            BrokerError: where the broker refuses us for good.
        """
        async with served(self.feed, listening):
            await self.follow()

    async def follow(self) -> None:
        """Keep the board until cancelled."""
        await run_all(self._journal(), self._signs_of_life())

    async def _journal(self) -> None:
        events = read_journal(self._transport, self._topology, live=True, backoff=_FOREVER)
        async with contextlib.aclosing(events):
            async for event in events:
                if event.moment is not None:
                    at = event.moment.timestamp()
                    self.feed.add(at, from_fields(event.event, event.fields), event.run)

    async def _signs_of_life(self) -> None:
        opened = reconnecting(self._transport, _FOREVER, self._no_broker)
        async with contextlib.aclosing(opened):
            async for link in opened:
                try:
                    await self._tap(link)
                except LinkLost as gone:
                    self._linked(False, f"lost the broker ({gone}); connecting again")
                except QueueInUse as no:
                    raise BrokerError(
                        f"the broker does not let this user show the page: {no}; it needs the "
                        f"rights to configure, write and read {self._topology.federation}.tap.* "
                        f"and to read {self._topology.results}"
                    ) from None

    def _no_broker(self, reason: str, _: float) -> None:
        self._linked(False, f"no broker at {self._transport.address} ({reason}); trying again")

    def _linked(self, linked: bool, words: str) -> None:
        self._board.link(linked, words)
        self.feed.touch()

    async def _tap(self, link: Link) -> None:
        federation, address = self._topology.federation, self._transport.address
        # The journal is the last that whoever comes first declares: with it, all else is there.
        while await link.counts(self._topology.journal) is None:
            self._linked(True, f"there is no federation {federation} at {address} yet")
            await asyncio.sleep(_NOBODY_YET_S)
        self._linked(True, f"linked to the broker at {address}")
        queue = self._topology.tap(f"page-{uuid.uuid4().hex[:8]}")
        bindings = [Binding(queue.name, self._topology.results, f"{kind}.#") for kind in _KINDS]
        copies = await link.tap(queue, bindings)
        async with contextlib.aclosing(copies):
            async for copy in copies:
                self._hear(copy)

    def _hear(self, copy: Delivery) -> None:
        try:
            said, _ = decode(copy.body, self._topology.federation)
        except MalformedMessage:
            return  # the coordinator rejects it, and the journal tells
        now = round(time.time(), 3)
        match said:
            case Hello() | Heartbeat():
                self._board.view.workers.sign_of_life(now, said.worker, said.model_dump())
            case Bye():
                self._board.view.workers.add(now, Left(worker=said.worker, reason=said.reason))
            case _:
                return
        self.feed.touch()
