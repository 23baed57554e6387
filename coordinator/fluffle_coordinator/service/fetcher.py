"""Fetches the parts of large updates, ahead of their turn if they use little memory."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import Assembly
from fluffle_common.tensors.groups import GroupedLayout
from fluffle_common.tensors.in_pieces import InPieces
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Link
from fluffle_common.transport.fetch_parts import fetch
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.service.spool import Spool, SpoolFile
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.strategy.update_checks import check_announced

Payload = memoryview | InPieces


class Fetcher:
    """Fetches the update that is folded next, and then at most one more.

    An update that may stay in pieces is spooled to disk and uses little memory, so it is fetched
    ahead. Any other update needs one block of memory and is fetched when it is folded. Only the
    updates of ``fedavg`` may stay in pieces: other strategies need whole tensors, by name.

    ``link`` returns the current link, or None while disconnected. Spool files are in ``folder``, or
    in the system's temporary folder if it is None.
    """

    def __init__(
        self,
        topology: Topology,
        settings: CoordinatorSettings,
        *,
        link: Callable[[], Link | None],
        folder: Path | None = None,
    ) -> None:
        self._topology, self._link, self._plan = topology, link, settings.whole_plan
        self._in_pieces = settings.strategy.name == FEDAVG.name
        self._verify_users = settings.verify_users
        self._folder, self._free_files = folder, list[SpoolFile]()
        self._expected: deque[Held] = deque()
        self._ahead: dict[Held, asyncio.Task[Payload]] = {}  # at most one
        # Two fetches at a time would share one connection: the update that is folded next would
        # arrive later, and up to five more parts of 4 MiB would be in memory.
        self._fetching = asyncio.Lock()

    def expect(self, held: Held, weights: Weights) -> None:
        """Add an update of a model to the end of the queue of those to fetch."""
        if held.message.transfer is not None and held not in self._ahead:
            self._expected.append(held)
            self._fetch_next(weights)

    def postpone(self, held: Held) -> None:
        """Stop expecting an update until the next sum asks for it; keep its fetched parts."""
        if held in self._expected:
            self._expected.remove(held)

    async def payload(self, held: Held, weights: Weights | None) -> Payload:
        """Return the tensors of an update or of first weights, whole or in pieces.

        ``weights`` is the model, or None before the first weights.

        Raises:
            MalformedMessage: if the announcement or the parts are invalid.
            PartsGone: if parts are missing.
            LinkLost: if the link was lost.
        """
        if held.message.transfer is None:
            return held.payload
        if (task := self._ahead.pop(held, None)) is not None:
            self._fetch_next(weights)
            return await task
        self.postpone(held)
        layout = check_announced(held.message, weights, self._plan)
        self._fetch_next(weights)
        in_pieces = self._stays_in_pieces(held.message, layout, weights)
        return await self._fetch(held, layout, in_pieces=in_pieces)

    async def drop(self, held: Held) -> None:
        """Stop expecting an update, and stop fetching it."""
        self.postpone(held)
        if held in self._ahead:
            await self.close()

    async def close(self) -> None:
        """Stop fetching ahead."""
        tasks = list(self._ahead.values())
        self._ahead.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fetch_next(self, weights: Weights | None) -> None:
        """Start fetching the next expected update, if it may stay in pieces."""
        if self._ahead or not self._expected:
            return
        held = self._expected[0]
        try:
            layout = check_announced(held.message, weights, self._plan)
        except MalformedMessage:
            return  # payload() raises it
        if self._stays_in_pieces(held.message, layout, weights):
            self.postpone(held)
            fetching = self._fetch(held, layout, in_pieces=True)
            self._ahead[held] = asyncio.create_task(fetching)

    async def _fetch(self, held: Held, layout: GroupedLayout, *, in_pieces: bool) -> Payload:
        message, link = held.message, self._link()
        if link is None:
            raise LinkLost("the connection was closed")
        assert message.transfer is not None
        into: Spool | Assembly
        if in_pieces:
            file = self._free_files.pop() if self._free_files else SpoolFile(self._folder)
            into = Spool(message.transfer, layout.layouts[MODEL], file)
            weakref.finalize(into, self._free_files.append, file)
        else:
            into = Assembly(message.transfer)
        async with self._fetching:
            await fetch(
                link,
                self._topology.outbox(message.worker),
                into,
                self._topology.rejected,
                user=message.worker if self._verify_users else None,
            )
        return into.payload()

    def _stays_in_pieces(
        self, message: Update | FirstWeights, layout: GroupedLayout, weights: Weights | None
    ) -> bool:
        """Whether an update can be folded in pieces: not encoded, only the model, one dtype."""
        if weights is None or not isinstance(message, Update) or message.encoding is not None:
            return False
        model = layout.layouts[MODEL]
        only_model = len(layout.layouts) == 1 and model is layout_for(weights)
        return self._in_pieces and only_model and model.floats and model.dtype is not None
