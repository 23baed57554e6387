"""The page of a running coordinator: a watcher of the run, a port, and a server between."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from fluffle_common.cli.console import warn
from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.dashboard.coordinator_source import CoordinatorSource
from fluffle_coordinator.dashboard.feed import queue_asker
from fluffle_coordinator.dashboard.server import exposure, listen, served, url_of

T = TypeVar("T")


class Page(CoordinatorSource):
    """The page of the coordinator in this process.

    The port is taken at once, and requests are answered in ``beside``.

    Args:
        address: ``HOST:PORT``, port 0 for any free one.
        topology: of the federation.
        url: the broker's URL.
        management: where its management API is.

    Raises:
        UsageError: where the port cannot be had.
    """

    def __init__(self, address: str, topology: Topology, url: str, management: str) -> None:
        self._listening = listen(address, "--dashboard")
        self.url = url_of(self._listening)
        if (exposed := exposure(self._listening)) is not None:
            warn(exposed)
        super().__init__(topology.federation, queue_asker(topology, url, management))

    def remember(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Show the rounds of an earlier coordinator of the same run."""
        self.feed.board.view.remember(rounds)

    async def beside(self, run: Coroutine[Any, Any, T]) -> T:
        """Answer requests for as long as the run takes; return what it returns."""
        async with served(self.feed, self._listening):
            return await run
