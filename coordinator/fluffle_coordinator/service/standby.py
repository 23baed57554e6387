"""Reports of a standby: a coordinator that waits while another one runs the federation."""

from __future__ import annotations

from fluffle_common.clock import monotonic
from fluffle_common.protocol import events as run_events
from fluffle_coordinator.observe.watchers import Watcher

_REPORT_EVERY_S = 30.0


class Standby:
    """Reports that a coordinator waits as a standby: at once, then rarely, and when it takes over.

    ``what`` is what another coordinator holds: the run folder, or the federation on a broker.
    """

    def __init__(self, what: str, watcher: Watcher) -> None:
        self._what, self._watcher = what, watcher
        self._reported_at: float | None = None

    def waits(self, holder: str = "") -> None:
        """Note another attempt that failed because of the other coordinator, if known by name."""
        now = monotonic()
        if self._reported_at is None or now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._watcher.record(run_events.Standby(what=self._what, holder=holder or None))

    def takes_over(self) -> None:
        """Note that no other coordinator is in the way; report it if one was before."""
        if self._reported_at is not None:
            self._reported_at = None
            what = f"no other coordinator holds {self._what} any more; taking over"
            self._watcher.record(run_events.Note(what=what))
