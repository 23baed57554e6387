"""What people are shown of a simulation: what becomes of its rounds, not each of its clients."""

from __future__ import annotations

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.observe.watchers import View, Watcher

# Thousands of clients come and answer, in no time.
_UNSAID = (
    run_events.Connected,
    run_events.Counted,
    run_events.Joined,
    run_events.Opened,
    run_events.Quorum,
    run_events.Waiting,
)


# So many names fit a line.
_FEW = 10


class Follower(Watcher):
    """Shows the rest of the events as a run does."""

    def __init__(self, view: View) -> None:
        self._view = view

    def record(self, event: RunEvent) -> None:
        """See ``Watcher``."""
        if isinstance(event, run_events.Committed):
            count = len(event.participants or ())
            if count > _FEW:
                event = run_events.Note(what=f"round {event.round}: committed with {count} updates")
        if not isinstance(event, _UNSAID):
            self._view.record(event)

    def show(self, state: State, now: float) -> None:
        """See ``Watcher``."""
        self._view.show(state, now)
