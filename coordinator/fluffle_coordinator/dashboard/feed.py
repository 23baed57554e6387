"""Connects a board to its viewers: change notification, cached JSON, and the queues' figures.

Nothing is computed unless someone looks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fluffle_common.cli.console import json_line
from fluffle_common.cli.settings import management_finder
from fluffle_common.clock import wall_time
from fluffle_common.errors import UsageError
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.management import REQUEST_ERRORS, fault_and_remedy
from fluffle_coordinator.dashboard.board import Board

Figures = Iterable[Mapping[str, Any]]
_AFTER_A_FAILURE_S = 10.0


class Feed:
    """A board with any number of viewers.

    ``refresh`` brings the board up to date, and is called before each read. ``ask_queues`` returns
    the queues' figures, and is called in a thread; without it, no queues are shown.
    """

    def __init__(
        self,
        board: Board,
        *,
        refresh: Callable[[], object] = lambda: None,
        ask_queues: Callable[[], Figures] | None = None,
    ) -> None:
        self._board = board
        self.version = 0
        self.closed = False
        self._refresh, self._ask_queues = refresh, ask_queues
        self._news = asyncio.Event()
        self._sections: dict[str, str] = {}
        self._sections_version = -1
        self._asking = asyncio.Lock()
        self._ask_again_at = -math.inf

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Take in an event; see ``Board.add``."""
        self._board.add(at, event, run)
        self.touch()

    def touch(self) -> None:
        """Announce that something may have changed."""
        self.version += 1
        self._news.set()

    def close(self) -> None:
        """End every viewer's stream."""
        self.closed = True
        self.touch()

    async def news(self, since: int) -> None:
        """Wait until there is something newer than version ``since``, or the feed is closed."""
        while self.version == since and not self.closed:
            self._news.clear()
            await self._news.wait()

    @property
    def board(self) -> Board:
        """The board, brought up to date."""
        self._refresh()
        return self._board

    def sections(self) -> dict[str, str]:
        """Return the page as JSON, one text per section, cached until something changes.

        The section ``now``, the time in seconds since 1970, is always new.
        """
        if self._sections_version != self.version:
            snapshot = self.board.snapshot()
            self._sections = {name: json_line(section) for name, section in snapshot.items()}
            self._sections_version = self.version
        return self._sections | {"now": json_line(wall_time())}

    async def ask_queues(self, max_age_s: float) -> None:
        """Refresh the queues' figures, unless they are younger than ``max_age_s``."""
        if self._ask_queues is None:
            return
        loop = asyncio.get_running_loop()
        async with self._asking:
            if loop.time() < self._ask_again_at:
                return
            try:
                figures = list(await asyncio.to_thread(self._ask_queues))
            except (*REQUEST_ERRORS, UsageError) as why:  # while a certificate is renewed
                fault, remedy = fault_and_remedy(why)
                self._board.queues((), f"RabbitMQ's management API {fault}; {remedy}")
                self._ask_again_at = loop.time() + max(max_age_s, _AFTER_A_FAILURE_S)
            else:
                self._board.queues(figures)
                self._ask_again_at = loop.time() + max_age_s
        self.touch()


def queue_asker(
    topology: Topology, find_url: Callable[[], str], management: str | None
) -> Callable[[], Figures]:
    """Return a function that fetches the queues' figures from the broker's management API.

    ``management`` is the URL of that API, if it is not the usual one of the broker.

    Raises:
        UsageError: if ``management`` has a user.
    """
    find = management_finder(management)
    return lambda: [asdict(one) for one in find(find_url()).queue_figures(topology)]
