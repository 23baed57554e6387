"""The console output of a simulation: its rounds, but not every client's events."""

from __future__ import annotations

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.observe.watchers import View

# Too many of these: a simulation can have thousands of clients.
_UNSAID = (
    run_events.Connected,
    run_events.Counted,
    run_events.Joined,
    run_events.Opened,
    run_events.Quorum,
    run_events.Waiting,
)
# At most so many participants are listed by name.
_FEW = 10


class Follower(View):
    """A view that passes over these events, and shortens commits with many participants."""

    def record(self, event: RunEvent) -> None:
        """See ``Watcher``."""
        if isinstance(event, run_events.Committed):
            count = len(event.participants or ())
            if count > _FEW:
                event = run_events.Note(what=f"round {event.round}: committed with {count} updates")
        if not isinstance(event, _UNSAID):
            super().record(event)
