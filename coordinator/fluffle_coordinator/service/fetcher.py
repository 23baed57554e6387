"""Gets the tensors of updates that came in parts: of the next one while this one is folded."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.messages import FirstWeights, Plan, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer import Assembly
from fluffle_common.tensors.groups import GroupedLayout
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.pieces import InPieces
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Link
from fluffle_common.transport.parts import fetch
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.spool import Spool, SpoolFile
from fluffle_coordinator.strategy.contribution import check_announced

Payload = memoryview | InPieces


class Fetcher:
    """Fetches one transfer at a time.

    What is in one piece of memory is fetched when it is asked for; what stays in pieces, of which
    little is in memory, is fetched ahead.

    Args:
        topology: where the parts lie.
        link: the link of the moment, None where there is none.
        weights: the model of the moment, None where there is none.
        plan: which tensors were asked for.
        in_pieces: whether updates may stay in pieces.
        max_bytes: the most that a transfer may have.
        verify_users: whether parts have to come from the worker's own user.
        folder: where updates wait until they are checked.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        link: Callable[[], Link | None],
        weights: Callable[[], Weights | None],
        plan: Plan,
        in_pieces: bool,
        max_bytes: int,
        verify_users: bool,
        folder: Path | None,
    ) -> None:
        self._topology, self._link = topology, link
        self._weights, self._plan = weights, plan
        self._in_pieces, self._max_bytes, self._verify_users = in_pieces, max_bytes, verify_users
        self._files = itertools.cycle((SpoolFile(folder), SpoolFile(folder)))
        self._expected: deque[Held] = deque()
        self._ahead: tuple[Held, asyncio.Task[Payload]] | None = None

    def expect(self, held: Held) -> None:
        """Note that an update will be asked for, after those noted before."""
        here = self._ahead is not None and self._ahead[0] is held
        if held.message.transfer is not None and not here:
            self._expected.append(held)

    def postpone(self, held: Held) -> None:
        """Note that an update will be asked for later, before all others; its parts are kept."""
        self._forget(held)

    async def payload(self, held: Held) -> Payload:
        """Return the bytes of an update's tensors, or the tensors where they stay in pieces.

        Raises:
            MalformedMessage: where they are not what was announced, or cannot be.
            PartsGone: where some are missing.
            LinkLost: where there is no link any more.
        """
        if held.message.transfer is None:
            return held.payload
        if self._ahead is not None and self._ahead[0] is held:
            task = self._ahead[1]
            self._ahead = None
            return await task
        self._forget(held)
        return await self._fetch(held, check_announced(held.message, self._weights(), self._plan))

    def fetch_next(self) -> None:
        """Begin with the next update that is expected."""
        if self._ahead is not None or not self._expected:
            return
        held = self._expected[0]
        try:
            layout = check_announced(held.message, self._weights(), self._plan)
        except MalformedMessage:
            return  # raised when it is asked for
        if self._stays_in_pieces(held.message, layout):
            self._forget(held)
            self._ahead = held, asyncio.create_task(self._fetch(held, layout))

    async def drop(self, held: Held) -> None:
        """Note that an expected update will not be asked for."""
        self._forget(held)
        if self._ahead is not None and self._ahead[0] is held:
            await self.close()

    async def close(self) -> None:
        """Stop fetching."""
        if self._ahead is not None:
            _, task = self._ahead
            self._ahead = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _forget(self, held: Held) -> None:
        if held in self._expected:
            self._expected.remove(held)

    async def _fetch(self, held: Held, layout: GroupedLayout) -> Payload:
        message, link = held.message, self._link()
        if link is None:
            raise LinkLost("the link was lost")
        assert message.transfer is not None
        into: Spool | Assembly
        if self._stays_in_pieces(message, layout):
            into = Spool(
                message.transfer, self._max_bytes, layout.layouts[MODEL], next(self._files)
            )
        else:
            into = Assembly(message.transfer, self._max_bytes)
        await fetch(
            link,
            self._topology.outbox(message.worker),
            into,
            self._topology.rejected,
            user=message.worker if self._verify_users else None,
        )
        return into.payload()

    def _stays_in_pieces(self, message: Update | FirstWeights, layout: GroupedLayout) -> bool:
        """Whether an update need not be put together, as for a codec or for several dtypes."""
        weights = self._weights()
        if weights is None or not isinstance(message, Update) or message.encoding is not None:
            return False
        model = layout.layouts[MODEL]
        alone = len(layout.layouts) == 1 and model is layout_for(weights)
        return self._in_pieces and alone and model.floats and model.dtype is not None
