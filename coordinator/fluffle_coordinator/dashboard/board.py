"""What the page shows, as a rendering of what happened: events and signs of life in, one dict out.

Pure: no clock and no IO. Times are seconds since 1970 and come in as data. Taking something in is
O(1), since it happens at every event of a run; ``snapshot`` does the work, when somebody looks.
Whatever can grow without end is bounded: a worker may send what it likes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.dashboard.snapshot import ending, results
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.worker_view import WorkerView, clipped

_JOURNAL_LINES = 100

PHASES = ("standby", "waiting", "open", "committing", "evaluating", "ended")


class Board:
    """Everything the page shows of one federation.

    Args:
        federation: its name.
        source: where this is known from: ``coordinator`` or ``journal``.
    """

    def __init__(self, federation: str, source: str = "coordinator") -> None:
        self.federation, self.source = federation, source
        self.view = RunView()
        self._linked = False
        self._link_words = "not connected to the broker yet"
        self._journal: deque[dict[str, Any]] = deque(maxlen=_JOURNAL_LINES)
        self._numbered = 0
        self.figures: list[Mapping[str, Any]] = []
        self.figures_note: str | None = "not asked yet"

    # --- taking in -----------------------------------------------------------------------------

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Take in an event of ``run``, when that is known apart from the event."""
        self.view.add(at, event, run)
        if self.source == "coordinator":
            self._follow_link(event)
        self._note(at, event)

    def link(self, linked: bool, words: str) -> None:
        """Take in whether the broker can be reached by whoever feeds this board."""
        self._linked, self._link_words = linked, words

    def queues(self, figures: Iterable[Mapping[str, Any]], note: str | None = None) -> None:
        """Take in the figures of the queues, and why they are old or missing, if they are."""
        self.figures, self.figures_note = list(figures), note

    def _follow_link(self, event: RunEvent) -> None:
        match event:
            case run_events.Connected() | run_events.Reconnected():
                self.link(True, event.sentence())
            case run_events.Disconnected() | run_events.NoBroker() | run_events.Standby():
                self.link(False, event.sentence())

    def _note(self, at: float, event: RunEvent) -> None:
        self._numbered += 1
        last = self._journal[-1] if self._journal else None
        line = {
            "id": self._numbered,
            "time": at,
            "event": event.name,
            "tone": event.severity,
            "text": clipped(event.sentence(), 600),
        }
        if isinstance(event, run_events.Waiting) and last and last["event"] == event.name:
            self._journal[-1] = line | {"id": last["id"]}  # it says so every ten seconds
        else:
            self._journal.append(line)

    # --- giving out ----------------------------------------------------------------------------

    def snapshot(self, now: float) -> dict[str, Any]:
        """Return the whole page at a time as plain data, one key a section."""
        return {
            "now": now,
            "run": self.run(),
            "open": self._open_section(),
            **results(self.view, self._current),
            "queues": {"figures": self.figures, "note": self.figures_note},
            "journal": list(self._journal),
        }

    @property
    def _current(self) -> int:
        """The round that is open or will be."""
        return self.view.open.number if self.view.open is not None else self.view.next

    def run(self) -> dict[str, Any]:
        """Return the section ``run``: where the run stands, in figures and in words."""
        current, view, words = self._current, self.view, self._words()
        if self._abandoned and view.phase != "ended":
            words = f"no coordinator is connected; last heard: {words}"
        return {
            "federation": self.federation,
            "source": self.source,
            "run": view.run,
            "phase": view.phase,
            "outcome": view.ended[1].name if view.ended else None,
            "words": words,
            "round": min(current, view.planned) if view.planned else current,
            "rounds": view.planned,
            "committed": view.committed,
            "linked": self._linked,
            "link": self._link_words,
        }

    @property
    def _abandoned(self) -> bool:
        """Whether nobody reads the signs of life, which a coordinator does as long as it lives."""
        presence = f"{self.federation}.presence"
        return self.source == "journal" and any(
            queue["name"] == presence and queue.get("consumers") == 0 for queue in self.figures
        )

    def _words(self) -> str:
        match self.view.phase:
            case "open":
                updates, needed = self.filling
                return f"round {self._current} is open: {updates} of {needed} updates"
            case "committing":
                return f"round {self._current}: averaging and writing the checkpoint"
            case "evaluating":
                return "all rounds are done; the last model is being evaluated"
            case "ended":
                return ending(self.view.ended[1] if self.view.ended else None)
            case "standby":
                return "waiting as a standby"
        reason = self.view.waiting[1].reason if self.view.waiting else ""
        return reason or ("between two rounds" if self.view.committed else "starting")

    @property
    def filling(self) -> tuple[int, int]:
        """How many updates the open round has, and how many close it."""
        one = self.view.open
        return (len(one.answers), one.needed or len(one.asked)) if one else (0, 0)

    def _open_section(self) -> dict[str, Any] | None:
        one = self.view.open
        if one is None or self.view.phase not in ("open", "committing"):
            return None
        updates, needed = self.filling
        return {
            "round": one.number,
            "updates": updates,
            "needed": needed,
            "opened_at": one.asked_at,
            "deadline_at": one.deadline_at,
            "answered": [asdict(answer) for answer in one.answers.values()],
            "missing": [
                self._missing(name, one.number, one.failures.get(name))
                for name in one.asked
                if name not in one.answers
            ],
        }

    def _missing(self, worker: str, current: int, failed: str | None) -> dict[str, Any]:
        """Say what a worker does that was asked and has not answered; whether that is hopeless."""
        row = self.view.workers.get(worker)
        if row is None and failed is None:
            return {"worker": worker, "doing": "not heard of yet", "hopeless": False}
        row = row or WorkerView(worker)
        doing = row.doing(current, None if failed is None else clipped(failed, 300))
        return {"worker": worker, "doing": doing, "hopeless": failed is not None or not row.is_here}
