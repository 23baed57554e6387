"""The board of a federation, fed from the broker: the coordinator can run anywhere.

Three sources: the journal (every event, from the oldest that the broker still has), copies of the
workers' heartbeats, and RabbitMQ's management API. All are read-only; the coordinator notices
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

from fluffle_common.clock import wall_time
from fluffle_common.concurrency import run_all
from fluffle_common.errors import BrokerError, LinkLost, MalformedMessage
from fluffle_common.protocol.events import Left, from_fields
from fluffle_common.protocol.messages import Bye, Heartbeat, Hello
from fluffle_common.protocol.topology import Binding, Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import AccessRefused, Delivery, Link, Transport
from fluffle_common.transport.reconnect import Backoff, reconnecting
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.feed import Feed, Figures
from fluffle_coordinator.dashboard.server import served
from fluffle_coordinator.observe.journal_reader import read_journal

_FOREVER = Backoff(give_up_s=math.inf)
_KINDS = ("hello", "heartbeat", "bye")
_JOURNAL_POLL_S = 2.0
_BIND_EVERY_S = 10.0


class BrokerSource:
    """Follows a federation through the broker and keeps its board.

    ``report`` is called with a sentence whenever the state of the connection changes.
    """

    def __init__(
        self,
        topology: Topology,
        transport: Transport,
        ask_queues: Callable[[], Figures],
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._topology, self._transport = topology, transport
        self._report, self._reported = report, ""
        self._board = Board(topology.federation, source="journal")
        self.feed = Feed(self._board, ask_queues=ask_queues)
        self._tapped = asyncio.Event()

    async def serve(self, listening: socket.socket) -> None:
        """Serve the page until cancelled; wait for the broker whenever it is away.

        Raises:
            BrokerError: if the broker refuses this user for good.
        """
        async with served(self.feed, listening):
            await run_all(self._follow_journal(), self._follow_presence())

    async def _follow_journal(self) -> None:
        await self._tapped.wait()  # so that a refusal names all permissions that the page needs
        events = read_journal(self._transport, self._topology, live=True, backoff=_FOREVER)
        async with contextlib.aclosing(events):
            async for event in events:
                if event.moment is not None:
                    at = event.moment.timestamp()
                    self.feed.add(at, from_fields(event.event, event.fields), event.run)

    async def _follow_presence(self) -> None:
        opened = reconnecting(self._transport, _FOREVER, self._no_broker)
        async with contextlib.aclosing(opened):
            async for link in opened:
                try:
                    await self._tap(link)
                except LinkLost as why:
                    self._set_link(
                        False, f"lost the connection to the broker ({why}); reconnecting"
                    )
                except AccessRefused as why:
                    raise BrokerError(
                        f"{why.lacking}; the page needs the permissions 'configure', 'write' and "
                        f"'read' on {self._topology.federation}.tap.*, and 'read' on "
                        f"{self._topology.results} and {self._topology.journal}"
                    ) from None

    def _no_broker(self, reason: str) -> None:
        self._set_link(False, f"no broker at {self._transport.address} ({reason}); trying again")

    def _set_link(self, linked: bool, sentence: str) -> None:
        if sentence != self._reported:
            self._report(sentence)
        self._reported = sentence
        self._board.link(linked, sentence)
        self.feed.touch()

    async def _tap(self, link: Link) -> None:
        federation, address = self._topology.federation, self._transport.address
        # A coordinator declares the journal last: once it exists, so does everything else.
        while await link.counts(self._topology.journal) is None:
            lacking = (
                f"no coordinator has created federation {federation} at {address} yet; check that "
                "the name is right"
            )
            if await link.exists(self._topology.work):
                lacking = (
                    f"federation {federation} has no journal at {address}, but this page needs "
                    "one; use 'fluffle coordinator --dashboard' instead"
                )
            self._set_link(True, lacking)
            await asyncio.sleep(_JOURNAL_POLL_S)
        self._set_link(True, f"connected to the broker at {address}")
        queue = self._topology.tap(f"page-{uuid.uuid4().hex[:8]}")
        bindings = [Binding(queue.name, self._topology.results, f"{kind}.#") for kind in _KINDS]
        async with contextlib.aclosing(await link.tap(queue, bindings)) as copies:
            self._tapped.set()
            await run_all(self._read_presence(copies), _keep_bound(link, bindings))

    async def _read_presence(self, copies: AsyncIterator[Delivery]) -> None:
        async for copy in copies:
            self._take_presence(copy)

    def _take_presence(self, copy: Delivery) -> None:
        try:
            message, _ = decode(copy.body, self._topology.federation)
        except MalformedMessage:
            return  # the coordinator rejects the original, and the journal shows that
        now, workers = round(wall_time(), 3), self._board.view.workers
        match message:
            case Hello() | Heartbeat():
                workers.sign_of_life(now, message.worker, message)
            case Bye():
                workers.add(now, Left(worker=message.worker, reason=message.reason))
            case _:
                return
        self.feed.touch()


async def _keep_bound(link: Link, bindings: Sequence[Binding]) -> None:
    """Bind again from time to time: an exchange may have been deleted and declared again."""
    while True:
        await asyncio.sleep(_BIND_EVERY_S)
        await link.bind(bindings)
