"""The progress display of ``fluffle.run``: a bar on a terminal, lines in a notebook."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from fluffle.keywords import with_keywords
from fluffle_common.cli.printing import can_redraw, echo, is_terminal, printable
from fluffle_common.plural import plural
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.observe.waiting import in_brief, missing, waiting_for
from fluffle_coordinator.observe.watchers import Watcher

_UPDATE_EVERY_S = 0.2
_ALWAYS = (
    run_events.Unmeasured,
    run_events.Repaired,
    run_events.Disk,
    run_events.NoBroker,
    run_events.Blocked,
)


class Progress(Watcher):
    """Shows the progress of a run of so many rounds on stderr.

    If ``wanted`` is None, it is shown on a terminal and in a notebook. Always reported are a
    monitored metric that no model has, because the run then does not end as the user expects, a
    repair of the run folder, because rounds are repeated, and what a run waits for although no
    worker can provide it: disk space, or a broker.
    """

    _under_way = False  # before the first round and after the last, notes name commands

    def __init__(self, wanted: bool | None, rounds: int) -> None:
        self._bar: Any = None
        watched = is_terminal(sys.stderr) or "ipykernel" in sys.modules
        self._lines = bool(wanted) or (wanted is None and watched)
        self._rounds, self._latest, self._brief, self._update_at = rounds, "", "", 0.0
        if can_redraw(sys.stderr) and wanted is not False:
            from fluffle_common.cli.progress_bars import progress_on

            self._lines, self._bar = False, progress_on(sys.stderr)
            self._task = self._bar.add_task("", label="rounds", total=rounds)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def record(self, event: RunEvent) -> None:
        """Show evaluations and problems."""
        match event:
            case run_events.Opened():
                self._under_way = True
            case run_events.Resumed(round=done, rounds=rounds) if done and rounds:
                self._print_if_none_left(done, rounds)
            case run_events.Finished():
                self._under_way = False
        if isinstance(event, run_events.MeasuredEvent):
            self._latest, self._brief = event.sentence(), event.in_brief()
            if self._lines:
                self._print(self._latest)
        elif isinstance(event, run_events.Interrupted):
            pass  # it names a command, but the run was a call; RunFolder names that
        elif self._lines or self._bar is not None or isinstance(event, _ALWAYS):
            noted = self._under_way and isinstance(event, run_events.Note)
            if noted or event.severity in ("odd", "bad"):
                self._print(with_keywords(event.sentence()))

    def _print_if_none_left(self, done: int, rounds: int) -> None:
        if done >= rounds and (self._lines or self._bar is not None):
            self._print(
                f"the run has {plural(done, 'round')} already, and rounds={rounds}, so no "
                "round is left to run; use a higher rounds= to add rounds, or fresh=True to start "
                "a new run"
            )

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False)
        else:
            echo(text, err=True)

    def show(self, state: State, now: float) -> None:
        """Move the bar."""
        if self._bar is None or (time.monotonic() < self._update_at and state.phase != Phase.ENDED):
            return
        self._update_at = time.monotonic() + _UPDATE_EVERY_S
        text, brief = self._latest, self._brief
        if state.phase is Phase.WAITING and (waiting := waiting_for(state, now)) is not None:
            text, brief = waiting.sentence(), in_brief(state, now)
        elif not text and state.phase is Phase.OPEN:
            text, brief = missing(state, now), in_brief(state, now)
        done = min(state.committed, self._rounds)
        texts = {"description": printable(text), "brief": printable(brief)}
        self._bar.update(self._task, completed=done, **texts)
