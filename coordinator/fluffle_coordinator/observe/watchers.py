"""Watchers: observers of a run, among them the one that writes log lines and draws bars."""

from __future__ import annotations

import time

from fluffle_common.cli.console import Console, warn
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.observe.waiting import in_brief, missing, waiting_for

_DRAW_EVERY_S = 0.2


class Watcher:
    """An observer of a run. Its methods are optional, and must neither block nor raise."""

    def record(self, event: RunEvent) -> None:
        """Receive an event of the run."""

    def show(self, state: State, now: float) -> None:
        """Receive the machine's state, after every event of the machine."""


class Watchers(Watcher):
    """Passes everything on to several watchers, in the given order.

    A watcher that raises has a bug, which is reported once on stderr. The run, the other watchers
    and that watcher continue.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers
        self._reported: set[Watcher] = set()

    def record(self, event: RunEvent) -> None:
        """Pass an event on."""
        for watcher in self._watchers:
            try:
                watcher.record(event)
            except Exception as wrong:
                self._report(watcher, f"the event '{event.name}'", wrong)

    def show(self, state: State, now: float) -> None:
        """Pass the machine's state on."""
        for watcher in self._watchers:
            try:
                watcher.show(state, now)
            except Exception as wrong:
                self._report(watcher, "the state of the run", wrong)

    def _report(self, watcher: Watcher, what: str, wrong: Exception) -> None:
        if watcher not in self._reported:
            self._reported.add(watcher)
            warn(f"{type(watcher).__name__} cannot show {what} ({wrong!r}); the run continues")


class View(Watcher):
    """Writes the events of a run as lines and its state as progress bars."""

    def __init__(self, console: Console) -> None:
        self._console, self._due_at = console, 0.0

    def record(self, event: RunEvent) -> None:
        """Write an event as a line."""
        self._console.event(event)

    def show(self, state: State, now: float) -> None:
        """Draw the bars."""
        # Called after every event, and the sentences name every worker. In real time, since
        # simulated time may pass without end between two events.
        is_due = time.monotonic() >= self._due_at or state.phase is Phase.ENDED
        if not self._console.draws or not is_due:
            return
        self._due_at = time.monotonic() + _DRAW_EVERY_S
        done = min(state.committed, state.rules.rounds)
        self._console.bar("rounds", done, state.rules.rounds)
        folded = state.folded if state.phase is Phase.OPEN else 0
        if state.phase is Phase.OPEN:
            words = f"round {state.round}: {missing(state, now)}"
        else:
            waiting = waiting_for(state, now)
            words = waiting.sentence() if waiting else f"round {state.round}: {state.phase}"
        self._console.bar("updates", folded, state.needed, words, in_brief(state, now))
