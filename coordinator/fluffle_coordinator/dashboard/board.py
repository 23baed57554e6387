"""What the page shows, as a fold over what happened: events and signs of life in, one dict out.

Pure: no clock and no IO. Times are seconds since 1970 and come in as data. Taking something in is
O(1), since it happens at every event of a run; ``snapshot`` does the work, when somebody looks.
Whatever can grow without end is bounded: a worker may send what it likes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fluffle_common.errors import CAUSES
from fluffle_common.protocol.events import from_fields
from fluffle_coordinator.dashboard.chronicle import STEPS, Chronicle, timings
from fluffle_coordinator.dashboard.roster import Roster, clipped

_JOURNAL_LINES = 100
_REJECTED_LINES = 30

OUTCOMES = ("counted", "late", "rejected", "duplicate")
OUTCOMES_OF_A_RUN = ("finished", "stopped", "interrupted")
PHASES = ("standby", "waiting", "open", "committing", "evaluating", "ended")
_PHASE_AFTER = {
    "standby": "standby",
    "started": "waiting",
    "resumed": "waiting",
    "opened": "open",
    "reopened": "open",
    "closed": "committing",
    "committed": "waiting",
    "finished": "ended",
    "stopped": "ended",
    "interrupted": "ended",
}
_BAD = {"rejected", "failure", "refused", "gone", "disconnected", "no_broker", "disk", "stopped"}
_ODD = {"late", "duplicate", "resend", "reopened", "closed", "left", "standby", "interrupted"}
_GOOD = {"committed", "finished", "evaluated", "joined"}


@dataclass(frozen=True)
class Standing:
    """What a coordinator knows of its run at this moment, better than its events can tell.

    Args:
        phase: one of ``PHASES``.
        round: the round that is open or will be.
        rounds: how many the run has.
        linked: whether there is a broker.
        updates: how many are in the running sum.
        needed: how many close the round.
        present, gate: how many workers are here, and how many must be to open a round.
        has_weights: whether there are weights to begin with.
        opened_at: when the round was opened; None where none is open.
        deadline_at: when its time is up.
        asked: who was asked.
        failed: who could not, and why.
    """

    phase: str
    round: int
    rounds: int
    linked: bool
    updates: int
    needed: int
    present: int
    gate: int
    has_weights: bool
    opened_at: float | None
    deadline_at: float | None
    asked: tuple[str, ...]
    failed: Mapping[str, str]


@dataclass
class Tally:
    """What is counted since the board was made, or since the journal begins."""

    rounds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    outages: int = 0
    update_bytes: int = 0
    step_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    step_rounds: Counter[str] = field(default_factory=Counter)
    committed_at: float | None = None


@dataclass
class _Open:
    """The open round, as its events tell it."""

    round: int
    asked: list[str]
    needed: int
    opened_at: float
    deadline_at: float | None
    answered: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Board:
    """Everything the page shows of one federation.

    Args:
        federation: its name.
        source: where this is known from: ``coordinator`` or ``journal``.
    """

    def __init__(self, federation: str, source: str = "coordinator") -> None:
        self.federation, self.source = federation, source
        self.tally = Tally()
        self.roster = Roster()
        self.chronicle = Chronicle()
        self._run: str | None = None
        self._rounds: int | None = None
        self._phase = "waiting"
        self._outcome: str | None = None
        self._linked = False
        self._link_words = "not connected to the broker yet"
        self._told = ""  # what the run last said it waits for, or why it ended
        self._open: _Open | None = None
        self._journal: deque[dict[str, Any]] = deque(maxlen=_JOURNAL_LINES)
        self._rejected: deque[dict[str, Any]] = deque(maxlen=_REJECTED_LINES)
        self._numbered = 0
        self.figures: list[Mapping[str, Any]] = []
        self.figures_note: str | None = "not asked yet"

    # --- taking in -----------------------------------------------------------------------------

    def tell(
        self, time: float, what: str, fields: Mapping[str, Any], run: str | None = None
    ) -> None:
        """Take an event in.

        Args:
            time: when it happened.
            what: its name, as in the journal.
            fields: what is known of it.
            run: the run it belongs to, where that is known apart from ``fields``.
        """
        run = fields.get("run") or run
        if isinstance(run, str) and run != self._run:
            self._begin(run)
        if isinstance(fields.get("rounds"), int):
            self._rounds = fields["rounds"]
        if what in _PHASE_AFTER:
            self._phase, self._told = _PHASE_AFTER[what], ""
        self._outcome = what if what in OUTCOMES_OF_A_RUN else self._outcome
        handle = getattr(self, f"_on_{what}", None)
        if handle is not None:
            handle(time, fields)
        self.roster.tell(time, what, fields)
        self._note(time, what, fields)

    def remember(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rounds of a history (``store.read_history``): they are shown, not counted."""
        for line in rounds:
            self.chronicle.remember(line)
            self.roster.remember(line.get("participants") or (), line["round"])

    def link(self, linked: bool, words: str) -> None:
        """Take in whether the broker can be reached by whoever feeds this board."""
        self._linked, self._link_words = linked, words

    def queues(self, figures: Iterable[Mapping[str, Any]], note: str | None = None) -> None:
        """Take in the figures of the queues, and why they are old or missing, if they are."""
        self.figures, self.figures_note = list(figures), note

    # --- one method an event -------------------------------------------------------------------

    def _begin(self, run: str) -> None:
        if self._run is not None:
            self.chronicle, self._rounds = Chronicle(), None
            self.roster.another_run()
        self._run, self._open = run, None

    def _on_connected(self, _: float, fields: Mapping[str, Any]) -> None:
        if self.source == "coordinator":
            address = fields.get("address")
            self.link(True, f"linked to the broker at {address}" if address else "linked")

    _on_reconnected = _on_connected

    def _on_disconnected(self, _: float, fields: Mapping[str, Any]) -> None:
        self.tally.outages += 1
        if self.source == "coordinator":
            self.link(False, f"lost the broker ({fields.get('reason', '')}); connecting again")

    def _on_no_broker(self, _: float, fields: Mapping[str, Any]) -> None:
        if self.source == "coordinator":
            self.link(False, f"no broker at {fields.get('address', '')}; trying again")

    def _on_standby(self, _: float, fields: Mapping[str, Any]) -> None:
        if self.source == "coordinator":
            self.link(False, from_fields("standby", fields).sentence())

    def _on_waiting(self, _: float, fields: Mapping[str, Any]) -> None:
        self._told = str(fields.get("reason", ""))

    def _on_opened(self, time: float, fields: Mapping[str, Any]) -> None:
        deadline_s = fields.get("deadline_s")
        self._open = _Open(
            round=fields["round"],
            asked=list(fields.get("asked", ())),
            needed=fields.get("needed") or len(fields.get("asked", ())),
            opened_at=time,
            deadline_at=None if deadline_s is None else time + deadline_s,
        )

    def _on_reopened(self, time: float, fields: Mapping[str, Any]) -> None:
        before = self._open
        self._on_opened(time, fields)
        if before is not None and self._open is not None and before.round == self._open.round:
            self._open.answered = before.answered

    def _on_counted(self, time: float, fields: Mapping[str, Any]) -> None:
        self.tally.outcomes["counted"] += 1
        self.tally.update_bytes += fields.get("bytes") or 0
        if self._open is None or fields.get("round") != self._open.round:
            return
        self._open.needed = fields.get("needed", self._open.needed)
        self._open.answered[fields["worker"]] = {
            "worker": fields["worker"],
            "num_examples": fields.get("num_examples"),
            "after_s": max(0.0, time - self._open.opened_at),
            "train_s": fields.get("train_s"),
            "bytes": fields.get("bytes"),
        }

    def _on_late(self, _: float, __: Mapping[str, Any]) -> None:
        self.tally.outcomes["late"] += 1

    def _on_duplicate(self, _: float, __: Mapping[str, Any]) -> None:
        self.tally.outcomes["duplicate"] += 1

    def _on_rejected(self, time: float, fields: Mapping[str, Any]) -> None:
        cause = fields.get("cause")
        cause = cause if cause in CAUSES else "malformed"
        self.tally.causes[cause] += 1
        if fields.get("kind") in (None, "update"):  # what cannot be read at all may have been one
            self.tally.outcomes["rejected"] += 1
        self._numbered += 1
        self._rejected.append(
            {
                "id": self._numbered,
                "time": time,
                "cause": cause,
                "reason": clipped(fields.get("reason", ""), 500),
                **{key: fields[key] for key in ("kind", "worker", "round") if fields.get(key)},
            }
        )

    def _on_failure(self, _: float, fields: Mapping[str, Any]) -> None:
        self.tally.failures += 1
        if self._open is not None and fields.get("round") == self._open.round:
            self._open.failed[fields["worker"]] = clipped(fields.get("reason", ""), 300)

    def _on_committed(self, time: float, fields: Mapping[str, Any]) -> None:
        self.tally.rounds += 1
        self.tally.committed_at = time
        for step, seconds in timings(fields).items():
            self.tally.step_seconds[step] += seconds
            self.tally.step_rounds[step] += 1
        was = self._open
        opened_at = was.opened_at if was is not None and was.round == fields["round"] else None
        self.chronicle.commit(time, fields, opened_at)
        self._open = None

    def _on_evaluated(self, _: float, fields: Mapping[str, Any]) -> None:
        self.chronicle.evaluate(fields, fields.get("metrics") or {})

    def _on_finished(self, _: float, fields: Mapping[str, Any]) -> None:
        self._open = None
        self._told = str(fields.get("reason", ""))

    _on_stopped = _on_finished

    def _on_interrupted(self, _: float, __: Mapping[str, Any]) -> None:
        self._told = "the same command (without --fresh) goes on from there"

    def _note(self, time: float, what: str, fields: Mapping[str, Any]) -> None:
        self._numbered += 1
        last = self._journal[-1] if self._journal else None
        line = {
            "id": self._numbered,
            "time": time,
            "event": what,
            "tone": tone(what),
            "text": clipped(from_fields(what, fields).sentence(), 600),
        }
        if what == "waiting" and last is not None and last["event"] == "waiting":
            self._journal[-1] = line | {"id": last["id"]}  # it says so every ten seconds
        else:
            self._journal.append(line)

    # --- giving out ----------------------------------------------------------------------------

    def snapshot(self, now: float, standing: Standing | None = None) -> dict[str, Any]:
        """Return the whole page as plain data, one key a section.

        Args:
            now: the time.
            standing: what the coordinator itself says, where this runs inside it.
        """
        current = self._current(standing)
        run = self.run(standing)
        is_open = run["phase"] == "open" or (run["phase"] == "committing" and standing is not None)
        return {
            "now": now,
            "run": run,
            "open": self._open_section(current, standing) if is_open else None,
            "rounds": self.chronicle.detailed(),
            "curves": self.chronicle.curves(),
            "workers": self.roster.rows(current),
            "queues": {"figures": self.figures, "note": self.figures_note},
            "journal": list(self._journal),
            "rejected": {"latest": list(self._rejected), "causes": dict(self.tally.causes)},
        }

    def _current(self, standing: Standing | None) -> int:
        """Return the round that is open or will be."""
        if standing is not None:
            return standing.round
        return self._open.round if self._open is not None else self.chronicle.next

    def run(self, standing: Standing | None = None) -> dict[str, Any]:
        """Return the section ``run``: where the run stands, in figures and in words."""
        current = self._current(standing)
        phase = self._phase if standing is None or self._phase == "ended" else standing.phase
        words = self._words(phase, current, standing)
        if self._abandoned and phase != "ended":
            words = f"no coordinator is connected; last heard: {words}"
        linked = self._linked and (standing is None or standing.linked)
        rounds = self._rounds if standing is None else standing.rounds
        return {
            "federation": self.federation,
            "source": self.source,
            "run": self._run,
            "phase": phase,
            "outcome": self._outcome if phase == "ended" else None,
            "words": words,
            "round": min(current, rounds) if rounds else current,
            "rounds": rounds,
            "committed": self.chronicle.committed,
            "linked": linked,
            "link": self._link_words,
        }

    @property
    def _abandoned(self) -> bool:
        """Whether nobody reads the signs of life, which a coordinator does as long as it lives."""
        presence = f"{self.federation}.presence"
        return self.source == "journal" and any(
            queue["name"] == presence and queue.get("consumers") == 0 for queue in self.figures
        )

    def _words(self, phase: str, current: int, standing: Standing | None) -> str:
        if phase == "open":
            updates, needed = self.filling(standing)
            return f"round {current} is open: {updates} of {needed} updates"
        if phase == "committing":
            return f"round {current}: averaging and writing the checkpoint"
        if phase == "evaluating":
            return "all rounds are done; the last model is being evaluated"
        if phase == "ended":
            return f"{self._outcome}: {self._told}"
        if phase == "standby":
            return "waiting as a standby"
        if standing is None:
            waiting = "between two rounds" if self.chronicle.committed else "starting"
            return self._told or waiting
        if standing.present < standing.gate:
            return f"waiting for workers: {standing.present} of {standing.gate} are here"
        return "about to open a round" if standing.has_weights else "waiting for the first weights"

    def filling(self, standing: Standing | None = None) -> tuple[int, int]:
        """Return how many updates the open round has, and how many close it."""
        if standing is not None:
            return standing.updates, standing.needed
        return (len(self._open.answered), self._open.needed) if self._open else (0, 0)

    def _open_section(self, current: int, standing: Standing | None) -> dict[str, Any]:
        told = self._open if self._open is not None and self._open.round == current else None
        answered = told.answered if told else {}
        asked = list(standing.asked) if standing else told.asked if told else []
        failed = dict(standing.failed) if standing else told.failed if told else {}
        updates, needed = self.filling(standing)
        return {
            "round": current,
            "updates": updates,
            "needed": needed,
            "opened_at": standing.opened_at if standing else told.opened_at if told else None,
            "deadline_at": standing.deadline_at if standing else told.deadline_at if told else None,
            "answered": list(answered.values()),
            "missing": [
                {"worker": name, "doing": self.roster.doing(name, current, failed.get(name))}
                for name in asked
                if name not in answered
            ],
        }


def tone(what: str) -> str:
    """Return how an event is to be shown: ``bad``, ``odd``, ``good`` or ``plain``."""
    tones = {"bad": _BAD, "odd": _ODD, "good": _GOOD}
    return next((name for name, events in tones.items() if what in events), "plain")
