"""What a run looks like, as a fold of its events: rounds, workers, what is waited for, its end.

Pure: no clock and no IO. Times are seconds since 1970 and come in with the events. A journal may
begin anywhere and may have been written by another version: what is not there is None, and nothing
raises. Taking an event in is O(open rounds), and whatever can grow without end is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent

_ROUNDS = 2000
_DETAILED = 50  # of older rounds, only the result is kept
_NOTES = 1000
_ABSENT = 10_000  # many more than take part; names are for whoever joins to choose
_A_CENTURY_S = 3.2e9


@dataclass(frozen=True)
class Answer:
    """An update that was counted."""

    worker: str
    at: float
    num_examples: int | None
    train_s: float | None
    bytes: int | None
    after_s: float | None  # since the round was last opened or opened again


@dataclass(frozen=True)
class Note:
    """Something else that happened to a round."""

    at: float
    event: RunEvent

    @property
    def worker(self) -> str | None:
        """The worker that it is about; None for the round itself, or nobody known."""
        return getattr(self.event, "worker", None) or None

    @property
    def reason(self) -> str:
        """Why; "" where nothing is said of it."""
        return getattr(self.event, "reason", None) or ""


@dataclass
class RoundView:
    """A round. ``needed`` is the quorum of the moment: it falls when someone who was asked goes.

    ``deadline_at`` is put off by an outage, as the coordinator does it; None where it is unknown.
    """

    number: int
    opened_at: float | None = None
    asked_at: float | None = None  # when it was last opened, or opened again
    asked: tuple[str, ...] = ()
    needed: int | None = None
    deadline_at: float | None = None
    openings: int = 0  # more than 1: a coordinator was started again while the round was open
    restarted_at: float | None = None  # meant until the round is opened again
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    joined: dict[str, float] = field(default_factory=dict)  # while the round was open
    committed_at: float | None = None
    participants: tuple[str, ...] = ()
    num_examples: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: int | None = None
    evaluated: bool = False

    @property
    def is_done(self) -> bool:
        """Whether there is a result of it."""
        return self.committed_at is not None or self.evaluated

    @property
    def is_open(self) -> bool:
        """Whether updates are still waited for."""
        return self.opened_at is not None and self.committed_at is None

    def note(self, at: float, event: RunEvent) -> None:
        """Remember an event that is about the round."""
        if len(self.notes) < _NOTES:
            self.notes.append(Note(at, event))


class RunView:
    """A run, as its events tell it.

    Args:
        only: the one round that is of interest; None for the latest ``_ROUNDS``.

    Attributes:
        run: its id; None where it is not known yet.
        planned: how many rounds it is to have.
        phase: ``standby``, ``waiting``, ``open``, ``committing`` or ``ended``.
        rounds: by their numbers.
        before: what happened while there was no round.
        present: the workers that are here, as far as is known.
        absent: those that are not: when they went, and how.
        waiting: what the coordinator last said it waits for, and when.
        ended: how the run has ended, and when.
        unlinked_since: when the coordinator lost the broker; None while it has it.
    """

    def __init__(self, only: int | None = None) -> None:
        self._only = only
        self.run: str | None = None
        self.planned: int | None = None
        self.phase = "waiting"
        self.rounds: dict[int, RoundView] = {}
        self.before = RoundView(0)
        self.present: set[str] = set()
        self.absent: dict[str, tuple[float, run_events.Left | run_events.Gone]] = {}
        self.waiting: tuple[float, run_events.Waiting] | None = None
        self.ended: tuple[float, RunEvent] | None = None
        self.unlinked_since: float | None = None
        self._open: dict[int, RoundView] = {}

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Take an event in, of ``run``, where that is known apart from the event."""
        run = getattr(event, "run", None) or run
        if run and run != self.run:
            self._begin(run)
        self.phase = _PHASE_AFTER.get(type(event), self.phase)
        take = _TAKE.get(type(event))
        if take is not None:
            take(self, at, event)

    def remember(self, one: RoundView) -> None:
        """Take in a round of a history."""
        for known in self._round(one.number):
            self.rounds[known.number] = one

    @property
    def open(self) -> RoundView | None:
        """The round that is open; None where none is."""
        return next(reversed(self._open.values()), None)

    @property
    def committed(self) -> int:
        """The last committed round; 0 where there is none."""
        committed = (n for n, one in self.rounds.items() if one.committed_at is not None)
        return max(committed, default=0)

    @property
    def next(self) -> int:
        """The round after the last that there is a result of."""
        return max((n for n, one in self.rounds.items() if one.is_done), default=0) + 1

    def _begin(self, run: str) -> None:
        if self.run is not None:
            self.rounds, self._open, self.planned = {}, {}, None
        self.run = run

    # --- who is here ---------------------------------------------------------------------------

    def _joined(self, at: float, event: run_events.Joined) -> None:
        worker = event.worker or ""
        self.present.add(worker)
        self.absent.pop(worker, None)
        self.before.failures.pop(worker, None)
        for one in self._open.values():
            one.failures.pop(worker, None)  # a process that was started again is asked again
            if worker not in one.asked:
                one.joined[worker] = at

    def _went(self, at: float, event: run_events.Left | run_events.Gone) -> None:
        worker = event.worker or ""
        self.present.discard(worker)
        self.absent[worker] = (at, event)
        if len(self.absent) > _ABSENT:
            del self.absent[next(iter(self.absent))]
        for one in (self._open if self._only is None else self.rounds).values():
            one.joined.pop(worker, None)

    # --- the run -------------------------------------------------------------------------------

    def _started(self, at: float, event: run_events.Started | run_events.Resumed) -> None:
        """Take in that a coordinator has started: it knows of nobody yet."""
        self.planned = event.rounds or self.planned
        for one in self._open.values():
            one.restarted_at, one.deadline_at = at, None
        self.present.clear()
        self.absent.clear()
        self.waiting = self.ended = self.unlinked_since = None

    def _connected(self, at: float, _: RunEvent) -> None:
        if self.unlinked_since is not None:
            away_s = max(at - self.unlinked_since, 0.0)
            for one in self._open.values():
                if one.deadline_at is not None:
                    one.deadline_at += away_s
        self.unlinked_since = None

    def _disconnected(self, at: float, _: RunEvent) -> None:
        if self.unlinked_since is None:
            self.unlinked_since = at

    def _waiting(self, at: float, event: run_events.Waiting) -> None:
        self.waiting = (at, event)

    def _ended(self, at: float, event: RunEvent) -> None:
        self.ended, self.waiting = (at, event), None

    # --- rounds --------------------------------------------------------------------------------

    def _opened(self, at: float, event: run_events.Opened) -> None:
        self.waiting = None
        for one in self._round(event.round):
            self._open.pop(one.number, None)  # it comes last, as the newest
            one.openings += 1
            one.opened_at, one.restarted_at = at, None
            # What was counted before a coordinator was lost comes again, and is counted again.
            one.answers, one.committed_at = {}, None
            self._ask(one, at, event)

    def _reopened(self, at: float, event: run_events.Reopened) -> None:
        for one in self._round(event.round):
            one.note(at, event)
            one.opened_at = one.opened_at or at
            self._ask(one, at, event)

    def _ask(
        self, one: RoundView, at: float, event: run_events.Opened | run_events.Reopened
    ) -> None:
        one.asked, one.needed, one.asked_at = event.asked or (), event.needed, at
        one.failures, one.joined = {}, {}
        one.deadline_at = None
        if event.deadline_s is not None and 0 <= event.deadline_s < _A_CENTURY_S:
            one.deadline_at = at + event.deadline_s
        if one.is_open:
            self._open[one.number] = one

    def _counted(self, at: float, event: run_events.Counted) -> None:
        worker = event.worker or ""
        for one in self._round(event.round):
            after_s = None if one.asked_at is None else max(0.0, at - one.asked_at)
            one.answers[worker] = Answer(
                worker, at, event.num_examples, event.train_s, event.bytes, after_s
            )
            one.failures.pop(worker, None)
            one.needed = event.needed or one.needed

    def _failure(self, at: float, event: run_events.Failure) -> None:
        for one in self._known(event.round):
            one.note(at, event)
            if len(one.failures) < _ABSENT:
                one.failures[event.worker or ""] = event.reason or ""

    def _committed(self, at: float, event: run_events.Committed) -> None:
        self.waiting = None
        for one in self._round(event.round):
            one.committed_at = at
            one.participants = event.participants or ()
            one.num_examples = event.num_examples
            one.timings = event.timings or {}
            self._open.pop(one.number, None)
        if self._only is None:
            self._let_go_of_details()

    def _evaluated(self, _: float, event: run_events.Evaluated) -> None:
        for one in self._round(event.round):
            one.loss, one.metrics = event.loss, event.metrics or {}
            one.evaluated_on, one.evaluated = event.num_examples, True

    def _noted(
        self, at: float, event: run_events.Closed | run_events.Late | run_events.Duplicate
    ) -> None:
        for one in self._known(event.round):
            one.note(at, event)

    def _rejected(
        self, at: float, event: run_events.Rejected | run_events.Refused | run_events.Resend
    ) -> None:
        """Take in what need not name a round: it is of that which was open when it run_events."""
        number = getattr(event, "round", None)
        about = {one.number: one for one in (*self._known(number), *self._open.values())}
        if not self.rounds:
            about[0] = self.before
        for one in about.values():
            one.note(at, event)

    # --- which rounds are kept -----------------------------------------------------------------

    def _round(self, number: int | None) -> Iterator[RoundView]:
        """Yield the round of this number, if it is kept."""
        if number is None or self._only not in (None, number):
            return
        if number not in self.rounds and len(self.rounds) >= _ROUNDS:
            oldest = min(self.rounds)
            del self.rounds[oldest]
            self._open.pop(oldest, None)
        yield self.rounds.setdefault(number, RoundView(number))

    def _known(self, number: int | None) -> Iterator[RoundView]:
        """Yield the round of this number, if it was opened or is the one that is of interest."""
        if number and (number in self.rounds or number == self._only):
            yield from self._round(number)
        elif number == 0:
            yield self.before

    def _let_go_of_details(self) -> None:
        for number in sorted(self.rounds)[-_DETAILED - 2 : -_DETAILED]:
            one = self.rounds[number]
            one.answers, one.notes, one.failures, one.joined = {}, [], {}, {}


_PHASE_AFTER: dict[type[RunEvent], str] = {
    run_events.Standby: "standby",
    run_events.Started: "waiting",
    run_events.Resumed: "waiting",
    run_events.Opened: "open",
    run_events.Reopened: "open",
    run_events.Closed: "committing",
    run_events.Committed: "waiting",
    run_events.Finished: "ended",
    run_events.Stopped: "ended",
    run_events.Interrupted: "ended",
}
_TAKE: dict[type[RunEvent], Callable[[RunView, float, Any], None]] = {
    run_events.Joined: RunView._joined,
    run_events.Left: RunView._went,
    run_events.Gone: RunView._went,
    run_events.Started: RunView._started,
    run_events.Resumed: RunView._started,
    run_events.Connected: RunView._connected,
    run_events.Reconnected: RunView._connected,
    run_events.Disconnected: RunView._disconnected,
    run_events.Waiting: RunView._waiting,
    run_events.Finished: RunView._ended,
    run_events.Stopped: RunView._ended,
    run_events.Interrupted: RunView._ended,
    run_events.Opened: RunView._opened,
    run_events.Reopened: RunView._reopened,
    run_events.Counted: RunView._counted,
    run_events.Failure: RunView._failure,
    run_events.Committed: RunView._committed,
    run_events.Evaluated: RunView._evaluated,
    run_events.Closed: RunView._noted,
    run_events.Late: RunView._noted,
    run_events.Duplicate: RunView._noted,
    run_events.Rejected: RunView._rejected,
    run_events.Refused: RunView._rejected,
    run_events.Resend: RunView._rejected,
}
