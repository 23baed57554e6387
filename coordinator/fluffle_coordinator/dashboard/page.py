"""The page that a coordinator serves itself (``--dashboard``)."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.dashboard.coordinator_source import CoordinatorSource
from fluffle_coordinator.dashboard.feed import queue_asker
from fluffle_coordinator.dashboard.server import listen, served, url_of

T = TypeVar("T")


class Page(CoordinatorSource):
    """A watcher of the run with a web server.

    The port is bound at once, so that a port in use stops the command before the run begins.
    Requests are answered while ``beside`` runs.

    Args:
        address: ``HOST:PORT``; port 0 means any free one.
        topology: the names of the federation's queues.
        url: URL of the broker.
        management: URL of its management API.

    Raises:
        UsageError: if ``address`` is malformed or cannot be bound.
    """

    def __init__(self, address: str, topology: Topology, url: str, management: str) -> None:
        self._listening = listen(address, "--dashboard")
        self.url = url_of(self._listening)
        super().__init__(topology.federation, queue_asker(topology, url, management))

    def remember(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Show the rounds that an earlier coordinator of the same run committed."""
        self.feed.board.view.remember(rounds)

    async def beside(self, run: Coroutine[Any, Any, T]) -> T:
        """Await ``run`` while answering requests; return its result."""
        async with served(self.feed, self._listening):
            return await run
