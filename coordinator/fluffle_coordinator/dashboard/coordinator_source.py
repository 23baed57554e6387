"""The board of the coordinator in this process, fed by watching its run."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from fluffle_common.clock import monotonic, wall_time
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.feed import Feed, Figures
from fluffle_coordinator.dashboard.server import served, url_of
from fluffle_coordinator.machine.clock import standstill_s
from fluffle_coordinator.machine.closing import deadline_at
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.waiting import waiting_for
from fluffle_coordinator.observe.watchers import Watcher

_T = TypeVar("_T")
_CLOCK_STEP_S = 0.5


class CoordinatorSource(Watcher):
    """A watcher that keeps the board of its run and serves it as a page.

    ``show`` costs the run one assignment; the state is read only when someone looks at the page.
    """

    def __init__(
        self,
        federation: str,
        listening: socket.socket,
        ask_queues: Callable[[], Figures] | None = None,
    ) -> None:
        self.listening = listening
        self._epoch = wall_time() - monotonic()
        self._state: State | None = None
        self._board = Board(federation)
        self.feed = Feed(self._board, refresh=self._refresh, ask_queues=ask_queues)

    @property
    def url(self) -> str:
        """The URL of the page."""
        return url_of(self.listening)

    def remember(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Show the rounds that an earlier coordinator of the same run committed."""
        self._board.view.remember(rounds)

    async def beside(self, run: Coroutine[Any, Any, _T]) -> _T:
        """Await ``run`` while answering requests; return its result."""
        async with served(self.feed, self.listening):
            return await run

    def record(self, event: RunEvent) -> None:
        """Take in an event of the run."""
        self.feed.add(wall_time(), event)

    def show(self, state: State, now: float) -> None:
        """Take in the state of the run's machine."""
        self._state = state
        self.feed.touch()

    def _refresh(self) -> None:
        # The offset moves only when the clock was set or the machine slept, so times do not jitter.
        now = monotonic()
        epoch = wall_time() - now
        if abs(epoch - self._epoch) > _CLOCK_STEP_S:
            self._epoch = epoch
        if self._state is not None:
            bring_up_to_date(self._board.view, self._state, self._epoch, now)


def bring_up_to_date(view: RunView, state: State, epoch: float, now: float) -> None:
    """Add to a view what only the machine's state shows: phase, cohort, deadline, heartbeats.

    ``now`` is the time by the machine's clock; with ``epoch`` added, it is in seconds since 1970.
    """
    view.planned = state.rules.rounds
    # Between the machine's end and the event that says how the run ended, the rest is still sent.
    if view.ended is None and state.phase is not Phase.ENDED:
        view.phase = str(state.phase)
    if state.phase is Phase.WAITING:
        waiting = waiting_for(state, now)
        view.waiting = None if waiting is None else (now + epoch, waiting)
    opened = view.open
    if opened is not None and opened.number == state.round:
        opened.asked, opened.needed = tuple(sorted(state.asked)), state.needed
        opened.failures = dict(state.failed)
        ends_at = deadline_at(state)
        if state.quorum_at is not None:
            ends_at = state.quorum_at + state.rules.grace_s
        opened.deadline_at = round(ends_at + standstill_s(state, now) + epoch, 3)
    for worker in state.workers.values():
        view.workers.sign_of_life(round(worker.last_seen + epoch, 3), worker.name, worker)
