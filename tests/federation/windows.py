"""A user's own schedule: every round is open for a minute and counts those who answered."""

from __future__ import annotations

from dataclasses import dataclass

from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.state import State


@dataclass(frozen=True)
class Windows(Schedule[State]):
    """Rounds of a fixed length that need one update."""

    window_s: float = 60.0

    def needed(self, state: State) -> int:
        return 1

    def cohort(self, state: State) -> tuple[str, ...]:
        return tuple(sorted(state.workers))

    def closes(self, state: State, now: float) -> bool:
        return now >= self.wakeup(state)

    def wakeup(self, state: State) -> float:
        return state.opened_at + self.window_s


minutes = Windows()
