"""Between a board and whoever looks at it: what is new, when to look, and the queues' figures.

Nothing is computed unless somebody looks, and nothing that goes wrong here reaches the run.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fluffle_common.cli.console import warn
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.management import UNTOLD, queue_figures
from fluffle_coordinator.dashboard.board import Board

Figures = Iterable[Mapping[str, Any]]
_AFTER_A_FAILURE_S = 10.0


class Feed:
    """A board that takes events in, looked at by any number of viewers.

    Args:
        board: what is shown.
        refresh: brings the board up to date before it is looked at.
        ask_queues: asks for the figures of the queues, off the event loop; None where nobody can.
        clock: the time, in seconds since 1970.
    """

    def __init__(
        self,
        board: Board,
        *,
        refresh: Callable[[], object] = lambda: None,
        ask_queues: Callable[[], Figures] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._board, self.clock = board, clock
        self.version = 0
        self.closed = False
        self._refresh, self._ask_queues = refresh, ask_queues
        self._news = asyncio.Event()
        self._sections: dict[str, str] = {}
        self._sections_of = -1
        self._asking = asyncio.Lock()
        self._ask_again_at = -math.inf
        self._failed = False

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Take an event in; what the board cannot take is warned of once, and left out."""
        try:
            self._board.add(at, event, run)
        except Exception as why:  # a page that cannot follow must not stop what it watches
            if not self._failed:
                what = f"an event '{event.name}' ({why!r})"
                warn(f"the page cannot show {what}; everything else goes on")
            self._failed = True
        self.touch()

    def touch(self) -> None:
        """Something may have changed."""
        self.version += 1
        self._news.set()

    def close(self) -> None:
        """Let every stream of news end."""
        self.closed = True
        self.touch()

    async def news(self, since: int) -> None:
        """Return when there is something newer than version ``since``, or the feed is closed."""
        while self.version == since and not self.closed:
            self._news.clear()
            await self._news.wait()

    @property
    def board(self) -> Board:
        """The board, as it is at this moment."""
        self._refresh()
        return self._board

    def sections(self) -> dict[str, str]:
        """Return the page as JSON, one text a section, the same object while nothing changes."""
        if self._sections_of != self.version:
            self._sections_of = self.version
            snapshot = self.board.snapshot(self.clock())
            self._sections = {name: as_json(section) for name, section in snapshot.items()}
        return self._sections

    async def ask_queues(self, max_age_s: float) -> None:
        """Ask for the queues' figures, unless they are younger than ``max_age_s``."""
        if self._ask_queues is None:
            return
        loop = asyncio.get_running_loop()
        async with self._asking:
            if loop.time() < self._ask_again_at:
                return
            try:
                figures = list(await asyncio.to_thread(self._ask_queues))
            except UNTOLD as why:
                reason = getattr(why, "reason", None) or why
                self._board.queues((), f"RabbitMQ's management API does not answer ({reason})")
                self._ask_again_at = loop.time() + max(max_age_s, _AFTER_A_FAILURE_S)
            else:
                self._board.queues(figures)
                self._ask_again_at = loop.time() + max_age_s
        self.touch()


def queue_asker(topology: Topology, url: str, base: str) -> Callable[[], Figures]:
    """Return what asks RabbitMQ's management API once; it raises what ``queue_figures`` does.

    Args:
        topology: of the federation.
        url: the broker's URL.
        base: where its management API is.
    """
    return lambda: [figures.as_dict() for figures in queue_figures(url, base, topology)]


def as_json(value: Any) -> str:
    """Return plain data as JSON on one line; what JSON has no word for becomes null or text."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(value), separators=(",", ":"))


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
