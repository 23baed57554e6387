"""Whoever follows a run: watchers, and the one that writes lines and draws bars."""

from __future__ import annotations

from typing import Protocol

from fluffle_common.cli.console import Console, warn
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.observe.waiting import missing, waiting_for


class Watcher(Protocol):
    """Whoever is told what happens in a run. Neither call may wait or raise: rounds go on."""

    def record(self, event: RunEvent) -> None:
        """Take note of one event."""

    def show(self, state: State, now: float) -> None:
        """Take note of where the run stands; called after every event of the round machine.

        Who keeps events only need not have it.
        """
        return


class Watchers(Watcher):
    """Tells several watchers the same, in the order in which they were given.

    A watcher that raises is a bug, which is reported once on stderr; the run and the other
    watchers go on, and that watcher gets the next event as before.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers
        self._shown = [one for one in watchers if type(one).show is not Watcher.show]
        self._reported: set[Watcher] = set()

    def record(self, event: RunEvent) -> None:
        """See ``Watcher``."""
        for watcher in self._watchers:
            try:
                watcher.record(event)
            except Exception as wrong:
                self._report(watcher, f"the event '{event.name}'", wrong)

    def show(self, state: State, now: float) -> None:
        """See ``Watcher``."""
        for watcher in self._shown:
            try:
                watcher.show(state, now)
            except Exception as wrong:
                self._report(watcher, "where the run stands", wrong)

    def _report(self, watcher: Watcher, what: str, wrong: Exception) -> None:
        if watcher not in self._reported:
            self._reported.add(watcher)
            warn(f"{type(watcher).__name__} cannot show {what} ({wrong!r}); the run goes on")


class View(Watcher):
    """Turns the events of a run into lines and bars."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def record(self, event: RunEvent) -> None:
        """Write one event."""
        self._console.event(event)

    def show(self, state: State, now: float) -> None:
        """Draw where the run stands."""
        if not self._console.draws:
            return  # this is called at every event: no sentences that nobody sees
        done = min(state.committed, state.rules.rounds)
        self._console.bar("rounds", done, state.rules.rounds)
        if state.phase is Phase.OPEN:
            self._console.bar(
                "updates", state.folded, state.needed, f"round {state.round}: {missing(state, now)}"
            )
        else:
            waiting = waiting_for(state, now)
            words = waiting.sentence() if waiting else f"round {state.round}: {state.phase}"
            self._console.bar("updates", 0, state.needed, words)
