"""Connects a board to its viewers: change notification, cached JSON, and the queues' figures.

Nothing is computed unless someone looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fluffle_common.cli.console import json_line
from fluffle_common.cli.settings import management_finder
from fluffle_common.clock import monotonic, wall_time
from fluffle_common.errors import UsageError
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.management import REQUEST_ERRORS, fault_and_remedy
from fluffle_coordinator.dashboard.board import Board

Figures = Iterable[Mapping[str, Any]]
_AFTER_A_FAILURE_S = 10.0
# However large the board is and however many viewers it has, their updates take at most 5 % of the
# loop's time to render, and the queues' figures at most 10 % of the management API's time.
_PAUSE_PER_RENDERING = 20
_PAUSE_PER_REQUEST = 10


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
        self._refresh, self._ask_queues = refresh, ask_queues
        self._news, self._ended = asyncio.Event(), asyncio.Event()
        self._sections: dict[str, str] = {}
        self._sections_version = -1
        self._render_again_at = -math.inf
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

    @property
    def closed(self) -> bool:
        """Whether every viewer's stream is ending."""
        return self._ended.is_set()

    def close(self) -> None:
        """End every viewer's stream."""
        self._ended.set()
        self.touch()

    async def news(self, since: int) -> tuple[int, dict[str, str]]:
        """Wait for sections newer than version ``since``; return their version, and them.

        Once the feed is closed, this returns the last ones at once.
        """
        while not self.closed and self._sections_version <= since:
            if self.version <= since:
                self._news.clear()
                await self._news.wait()
            elif (left_s := self._render_again_at - monotonic()) > 0:
                await self.pause(left_s)
            else:
                break
        # Those that another viewer has just had rendered are new enough, except for the last.
        if self.closed or self._sections_version <= since:
            self.sections()
        return self._sections_version, self._with_time()

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the feed is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

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
            began, version = monotonic(), self.version
            snapshot = self.board.snapshot()
            self._sections = {name: json_line(section) for name, section in snapshot.items()}
            self._sections_version, ended = version, monotonic()
            self._render_again_at = ended + _PAUSE_PER_RENDERING * (ended - began)
        return self._with_time()

    def _with_time(self) -> dict[str, str]:
        return self._sections | {"now": json_line(wall_time())}

    async def ask_queues(self, max_age_s: float) -> None:
        """Refresh the queues' figures, unless they are younger than ``max_age_s``."""
        if self._ask_queues is None:
            return
        async with self._asking:
            began = monotonic()
            if began < self._ask_again_at:
                return
            try:
                figures = list(await asyncio.to_thread(self._ask_queues))
            except (*REQUEST_ERRORS, UsageError) as why:  # while a certificate is renewed
                fault, remedy = fault_and_remedy(why)
                self._board.queues((), f"RabbitMQ's management API {fault}; {remedy}")
                self._ask_again_at = monotonic() + max(max_age_s, _AFTER_A_FAILURE_S)
            else:
                self._board.queues(figures)
                ended = monotonic()
                self._ask_again_at = ended + max(max_age_s, _PAUSE_PER_REQUEST * (ended - began))
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
