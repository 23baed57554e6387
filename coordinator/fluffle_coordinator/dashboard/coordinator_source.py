"""The page of a coordinator that runs in this very process: it watches the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.dashboard.board import Board, Standing
from fluffle_coordinator.dashboard.feed import Feed, Figures
from fluffle_coordinator.machine.state import Phase, State, Worker

_CLOCK_STEP_S = 0.5


class Live:
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
        self.feed = Feed(
            Board(federation), refresh=self._refresh, ask_queues=ask_queues, clock=clock
        )

    def record(self, event: RunEvent) -> None:
        """Take an event of the run."""
        self.feed.add(self._clock(), event)

    def show(self, state: State, now: float) -> None:
        """Take where the run stands."""
        self._state = state
        self.feed.touch()

    def _refresh(self) -> Standing | None:
        # The clock is set, a laptop sleeps: only then, so that times do not tremble.
        epoch = self._clock() - self._monotonic()
        if abs(epoch - self._epoch) > _CLOCK_STEP_S:
            self._epoch = epoch
        state = self._state
        if state is None:
            return None
        for worker in state.workers.values():
            seen_at = round(worker.last_seen + self._epoch, 3)
            self.feed.board.view.workers.sign_of_life(seen_at, worker.name, said(worker))
        return standing(state, self._epoch)


def said(worker: Worker) -> dict[str, Any]:
    """Return what a worker said of itself, as in its heartbeat."""
    return {
        "state": worker.state,
        "num_examples": worker.num_examples,
        "run": worker.run,
        "round": worker.round,
        "step": worker.step,
        "steps": worker.steps,
        "loss": worker.loss,
        "heartbeat_s": worker.heartbeat_s,
    }


def standing(state: State, epoch: float) -> Standing:
    """Return what the page wants to know of a run's state.

    Args:
        state: the state of the round machine.
        epoch: what to add to its times for seconds since 1970.
    """
    is_open = state.phase in (Phase.OPEN, Phase.COMMITTING)
    if not is_open:
        deadline_at = None
    elif state.quorum_at is not None:
        deadline_at = round(state.quorum_at + state.rules.grace_s + epoch, 3)
    else:
        deadline_at = round(state.opened_at + state.rules.deadline_s + epoch, 3)
    return Standing(
        phase=str(state.phase),
        round=state.round,
        rounds=state.rules.rounds,
        linked=state.link > 0,
        updates=state.folded,
        needed=state.needed,
        present=len(state.workers),
        gate=state.gate,
        has_weights=state.has_weights,
        opened_at=round(state.opened_at + epoch, 3) if is_open else None,
        deadline_at=deadline_at,
        asked=tuple(sorted(state.asked)),
        failed=dict(state.failed),
    )
