"""What a run looks like, as a fold of its events: rounds, workers, what is waited for, its end.

Pure: no clock and no IO. Times are seconds since 1970 and come in with the events. A journal may
begin anywhere and may have been written by another version: what is not there is None, and nothing
raises. Taking an event in is O(open rounds), and whatever can grow without end is bounded.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent, from_fields
from fluffle_common.protocol.metric_names import add_test_prefix
from fluffle_coordinator.observe.round_view import Answer, RoundView, late_updates, remembered
from fluffle_coordinator.observe.tally import Tally, cause_of
from fluffle_coordinator.observe.worker_view import Departure, Workers

_ROUNDS = 2000
_DETAILED = 50  # of older rounds, only the result is kept
_FAILURES = 10_000
_REJECTIONS = 30
_A_CENTURY_S = 3.2e9


class RunView:
    """A run, as its events tell it.

    Args:
        only: the one round that is of interest; None for the latest ``_ROUNDS``.
        whole: keep every round of a history, in full.

    Attributes:
        run: its id; None where it is not known yet.
        planned: how many rounds it is to have.
        phase: ``standby``, ``waiting``, ``open``, ``committing`` or ``ended``.
        rounds: by their numbers.
        before: what happened while there was no round.
        workers: everybody who was heard of.
        rejections: the latest messages that were rejected: when, in which round (0: none was
            open), and what is known of them.
        causes: how many messages were rejected, by cause.
        tally: what is counted across runs, for Prometheus.
        waiting: what the coordinator last said it waits for, and when.
        ended: how the run has ended, and when.
        unlinked_since: when the coordinator lost the broker; None while it has it.
    """

    def __init__(self, only: int | None = None, *, whole: bool = False) -> None:
        self._only, self._most = only, math.inf if whole else _ROUNDS
        self.whole = whole
        self.run: str | None = None
        self.planned: int | None = None
        self.phase = "waiting"
        self.rounds: dict[int, RoundView] = {}
        self.before = RoundView(0)
        self.workers = Workers()
        self.tally = Tally()
        self.causes: Counter[str] = Counter()
        self.rejections: deque[tuple[float, int, run_events.Rejected]] = deque(
            maxlen=None if whole else _REJECTIONS
        )
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
        self.workers.add(at, event)
        self.tally.add(at, event)
        take = _TAKE.get(type(event))
        if take is not None:
            take(self, at, event)

    def remember(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rounds of a history (``history.read_history``): shown, not tallied."""
        rows = sorted(rows, key=lambda row: row["round"])
        for row in rows:
            for known in self._round(row["round"]):
                self.rounds[known.number] = one = remembered(row)
                for name in one.asked:
                    self.workers.remember(name)
                for answer in one.answers.values():
                    worker = self.workers.remember(answer.worker)
                    worker.count(answer.num_examples, answer.bytes, answer.train_s)
        for number, name in late_updates(rows):
            self.workers.remember(name).late += 1
            if number in self.rounds:
                self.rounds[number].came_late.add(name)
        for row in rows:  # at the end: the name in a message that was refused may be anybody's
            one = self.rounds.get(row["round"], self.before)
            for fields in row.get("rejections", ()):
                event = from_fields(run_events.Rejected.name, fields)
                self.workers.add(one.committed_at or 0.0, event)
                self._reject(one.committed_at or 0.0, one.number, event)
        if not self.whole:
            for number in sorted(self.rounds)[:-_DETAILED]:
                self.rounds[number].let_go_of_details()

    def _reject(self, at: float, during: int, event: RunEvent) -> None:
        if isinstance(event, run_events.Rejected):
            self.causes[cause_of(event)] += 1
            self.rejections.append((at, during, event))

    @property
    def done(self) -> list[RoundView]:
        """The rounds that there is a result of, in their order."""
        return [self.rounds[n] for n in sorted(self.rounds) if self.rounds[n].is_done]

    @property
    def detailed(self) -> list[RoundView]:
        """Those of them that are kept in full."""
        return self.done if self.whole else self.done[-_DETAILED:]

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
            self.causes.clear()
            self.rejections.clear()
            self.workers.another_run()
        self.run = run

    # --- who is here ---------------------------------------------------------------------------

    def _joined(self, at: float, event: run_events.Joined) -> None:
        worker = event.worker or ""
        self.before.failures.pop(worker, None)
        for one in self._open.values():
            one.failures.pop(worker, None)  # a process that was started again is asked again
            if worker not in one.asked:
                one.joined[worker] = at

    def _went(self, _: float, event: Departure) -> None:
        worker = event.worker or ""
        for one in (self._open if self._only is None else self.rounds).values():
            one.joined.pop(worker, None)

    # --- the run -------------------------------------------------------------------------------

    def _started(self, at: float, event: run_events.Started | run_events.Resumed) -> None:
        """Take in that a coordinator has started: it knows of nobody yet."""
        self.planned = event.rounds or self.planned
        for one in self._open.values():
            one.restarted_at, one.deadline_at = at, None
        self.workers.another_coordinator()
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
            one.answers[one.place_of(worker, event.updates or 0)] = Answer(
                worker,
                at,
                event.num_examples,
                event.train_s,
                event.bytes,
                after_s,
                staleness=getattr(event, "staleness", None),
                weight=getattr(event, "weight", None),
            )
            one.failures.pop(worker, None)
            one.needed = event.needed or one.needed

    def _quorum(self, _: float, event: run_events.Quorum) -> None:
        for one in self._known(event.round):
            one.needed = event.needed or one.needed

    def _failure(self, at: float, event: run_events.Failure) -> None:
        for one in self._known(event.round):
            one.note(at, event)
            if len(one.failures) < _FAILURES:
                one.failures[event.worker or ""] = event.reason or ""

    def _privacy(self, _: float, event: run_events.Privacy) -> None:
        for one in self._round(event.round):
            one.epsilon = event.epsilon

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
            one.loss, one.metrics = event.loss, {**one.metrics, **(event.metrics or {})}
            one.evaluated_on, one.evaluated = event.num_examples, True

    def _tested(self, _: float, event: run_events.Tested) -> None:
        for one in self._round(event.round):
            one.metrics = {**one.metrics, **add_test_prefix(event.metrics or {})}

    def _noted(self, at: float, event: run_events.Closed | run_events.Duplicate) -> None:
        for one in self._known(event.round):
            one.note(at, event)

    def _late(self, at: float, event: run_events.Late) -> None:
        for one in self._known(event.round):
            one.note(at, event)
            one.came_late.add(event.worker or "")
        if self.rounds:
            (self.open or self.rounds[max(self.rounds)]).late += 1

    def _rejected(self, at: float, event: run_events.Rejected) -> None:
        now = self.open
        if now is not None:
            now.rejected += 1
        self._reject(at, now.number if now else 0, event)
        self._of_no_round(at, event)

    def _of_no_round(
        self, at: float, event: run_events.Rejected | run_events.Refused | run_events.Resend
    ) -> None:
        """Take in what need not name a round: it is of that which was open when it happened."""
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
        if number not in self.rounds and len(self.rounds) >= self._most:
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
            self.rounds[number].let_go_of_details()


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
    run_events.Quorum: RunView._quorum,
    run_events.Failure: RunView._failure,
    run_events.Committed: RunView._committed,
    run_events.Evaluated: RunView._evaluated,
    run_events.Privacy: RunView._privacy,
    run_events.Tested: RunView._tested,
    run_events.Closed: RunView._noted,
    run_events.Late: RunView._late,
    run_events.Duplicate: RunView._noted,
    run_events.Rejected: RunView._rejected,
    run_events.Refused: RunView._of_no_round,
    run_events.Resend: RunView._of_no_round,
}
