"""The content of the live page: events and heartbeats in, one dict of plain data out.

Pure: no clock, no IO; times are seconds since 1970 and come in as data. Taking in an event is O(1),
because every event of a run passes here; ``snapshot`` does the work, and only when someone looks.
Everything that workers could make grow is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.dashboard.snapshot import ending, grouped, results
from fluffle_coordinator.observe.round_view import RoundView
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.worker_view import WorkerView, clipped

_JOURNAL_LINES = 100


class Board:
    """Everything the page shows of one federation.

    ``source`` is where the events come from: ``coordinator`` or ``journal``.
    """

    def __init__(self, federation: str, source: str = "coordinator") -> None:
        self.federation, self.source = federation, source
        self.view = RunView()
        self._linked = False
        self._link_sentence = "not connected to the broker yet"
        self._journal: deque[dict[str, Any]] = deque(maxlen=_JOURNAL_LINES)
        self._lines_seen = 0
        self.figures: list[Mapping[str, Any]] = []
        self.figures_note: str | None = "not asked yet"

    # --- input ---------------------------------------------------------------------------------

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Take in an event; ``run`` is its run id, if known from elsewhere than the event."""
        self.view.add(at, event, run)
        if self.source == "coordinator":
            self._follow_link(event)
        self._add_to_journal(at, event)

    def link(self, linked: bool, sentence: str) -> None:
        """Take in whether the source of this board is connected to the broker."""
        self._linked, self._link_sentence = linked, sentence

    def queues(self, figures: Iterable[Mapping[str, Any]], note: str | None = None) -> None:
        """Take in the queues' figures; ``note`` says why there are none."""
        self.figures, self.figures_note = list(figures), note

    def _follow_link(self, event: RunEvent) -> None:
        match event:
            case run_events.Connected() | run_events.Reconnected():
                self.link(True, event.sentence())
            case run_events.Disconnected() | run_events.NoBroker() | run_events.Standby():
                self.link(False, event.sentence())

    def _add_to_journal(self, at: float, event: RunEvent) -> None:
        self._lines_seen += 1
        last = self._journal[-1] if self._journal else None
        line = {
            "id": self._lines_seen,
            "time": at,
            "event": event.name,
            "tone": event.severity,
            "text": clipped(event.sentence(), 600),
        }
        if isinstance(event, run_events.Waiting) and last and last["event"] == event.name:
            self._journal[-1] = line | {"id": last["id"]}  # repeated every ten seconds
        else:
            self._journal.append(line)

    # --- output --------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return the whole page as plain data, one key per section."""
        return {
            "run": self.run(),
            "open": self._open_section(),
            **results(self.view),
            "queues": {
                "figures": grouped(self.figures, self.federation),
                "note": self.figures_note,
            },
            "journal": list(self._journal),
        }

    @property
    def _current(self) -> int:
        """The number of the open round, or of the next one."""
        return self.view.open.number if self.view.open is not None else self.view.next

    def run(self) -> dict[str, Any]:
        """Return the section ``run``: the state of the run, in figures and as a sentence."""
        current, view, words = self._current, self.view, self._phase_sentence()
        abandoned = self._abandoned and view.phase != "ended"
        if abandoned:
            words = f"no coordinator is connected (last known state: {words})"
        return {
            "federation": self.federation,
            "source": self.source,
            "run": view.run,
            "phase": view.phase,
            "outcome": view.ended[1].name if view.ended else None,
            "words": words,
            "abandoned": abandoned,
            "round": min(current, view.planned) if view.planned else current,
            "rounds": view.planned,
            "committed": view.committed,
            "linked": self._linked,
            "link": self._link_sentence,
        }

    @property
    def _abandoned(self) -> bool:
        """Whether the presence queue has no consumer, that is, no coordinator is connected."""
        presence = Topology(self.federation).presence
        return self.source == "journal" and any(
            queue["name"] == presence and queue.get("consumers") == 0 for queue in self.figures
        )

    def _phase_sentence(self) -> str:
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
        if self.source == "journal" and self.view.run is None and self._link_sentence:
            return self._link_sentence  # no coordinator, or no broker
        reason = self.view.waiting[1].reason if self.view.waiting else ""
        return reason or ("between two rounds" if self.view.committed else "starting")

    @property
    def filling(self) -> tuple[int, int]:
        """The number of updates in the open round, and the number that closes it."""
        opened = self.view.open
        return (len(opened.answers), opened.needed or len(opened.asked)) if opened else (0, 0)

    def _open_section(self) -> dict[str, Any] | None:
        opened = self.view.open
        if opened is None or self.view.phase not in ("open", "committing"):
            return None
        updates, needed = self.filling
        # The journal has the deadline for the quorum, but not how long a quorum waits for more.
        is_known = self.source == "coordinator" or updates < needed
        return {
            "round": opened.number,
            "updates": updates,
            "needed": needed,
            "opened_at": opened.asked_at,
            "deadline_at": opened.deadline_at if is_known else None,
            "answered": [_answer(key, opened) for key in opened.answers],
            "missing": [
                self._missing(name, opened) for name in opened.asked if name not in opened.answers
            ],
        }

    def _missing(self, worker: str, opened: RoundView) -> dict[str, Any]:
        """Return what a worker without an update is doing, and whether it can still send one."""
        row = self.view.workers.get(worker)
        failure, rejection = opened.failures.get(worker), opened.rejections.get(worker)
        if failure is None and rejection is not None and row is not None and row.state == "idle":
            failure = rejection.reason
        if row is None and failure is None:
            return {"worker": worker, "doing": "no heartbeat yet", "hopeless": False}
        row = row or WorkerView(worker)
        doing = row.doing(opened.number, None if failure is None else clipped(failure, 300))
        hopeless = failure is not None or not row.is_here
        return {"worker": worker, "doing": doing, "hopeless": hopeless}


def _answer(key: str, opened: RoundView) -> dict[str, Any]:
    at, update = opened.answers[key]
    names = ("worker", "num_examples", "bytes", "staleness")
    return {"key": key, "after_s": opened.after_s(at)} | {n: getattr(update, n) for n in names}
