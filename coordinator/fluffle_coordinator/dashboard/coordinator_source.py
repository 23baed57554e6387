"""The page of a coordinator that runs in this very process: it watches the run."""

from __future__ import annotations

import time
from collections.abc import Callable

from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.feed import Feed, Figures
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.waiting import waiting_for

_CLOCK_STEP_S = 0.5
_IN_A_HEARTBEAT = (
    "state", "num_examples", "run", "round", "step", "steps", "loss", "heartbeat_s",
)  # fmt: skip


class CoordinatorSource:
    """A watcher of a run (``watchers.Watcher``) that keeps a board for the page.

    To be shown the run's state costs one assignment; it is read when somebody looks.

    Args:
        federation: its name.
        ask_queues: asks for the figures of the queues; see ``Feed``.
        clock: the time, in seconds since 1970.
        monotonic: the clock of the run.
    """

    def __init__(
        self,
        federation: str,
        ask_queues: Callable[[], Figures] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._monotonic = clock, monotonic
        self._epoch = clock() - monotonic()
        self._state: State | None = None
        self._board = Board(federation)
        self.feed = Feed(self._board, refresh=self._refresh, ask_queues=ask_queues, clock=clock)

    def record(self, event: RunEvent) -> None:
        """Take an event of the run."""
        self.feed.add(self._clock(), event)

    def show(self, state: State, now: float) -> None:
        """Take where the run stands."""
        self._state = state
        self.feed.touch()

    def _refresh(self) -> None:
        # The clock is set, a laptop sleeps: only then, so that times do not tremble.
        epoch = self._clock() - self._monotonic()
        if abs(epoch - self._epoch) > _CLOCK_STEP_S:
            self._epoch = epoch
        if self._state is not None:
            bring_up_to_date(self._board.view, self._state, self._epoch, self._monotonic())


def bring_up_to_date(view: RunView, state: State, epoch: float, now: float) -> None:
    """Tell a view of the run what its machine knows better than its events can tell.

    Args:
        view: of the run's events.
        state: the state of the round machine.
        epoch: what to add to its times for seconds since 1970.
        now: the time by its clock.
    """
    view.planned = state.rules.rounds
    if view.ended is None:
        view.phase = str(state.phase)
    if state.phase is Phase.WAITING:
        waiting = waiting_for(state, now)
        view.waiting = None if waiting is None else (now + epoch, waiting)
    one = view.open
    if one is not None and one.number == state.round:
        one.asked, one.needed = tuple(sorted(state.asked)), state.needed
        one.failures = dict(state.failed)
        ends_at = state.opened_at + state.rules.deadline_s
        if state.quorum_at is not None:
            ends_at = state.quorum_at + state.rules.grace_s
        one.deadline_at = round(ends_at + epoch, 3)
    for worker in state.workers.values():
        told = {name: getattr(worker, name) for name in _IN_A_HEARTBEAT}
        view.workers.sign_of_life(round(worker.last_seen + epoch, 3), worker.name, told)
