"""The one fold from events to what a run looks like: its rounds, workers and outcome.

``explain``, the live page, the report and the metrics all render a ``RunView``. It is pure: times,
in seconds since 1970, come from the events. A journal may begin anywhere and come from another
version of fluffle, so missing facts are None and nothing raises. An event costs O(open rounds), and
memory is bounded.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent, from_fields
from fluffle_common.protocol.metric_names import add_test_prefix
from fluffle_coordinator.observe.counters import Counters, cause_of
from fluffle_coordinator.observe.round_view import Answer, Note, RoundView, late_updates, remembered
from fluffle_coordinator.observe.worker_view import Departure, Workers

_MAX_ROUNDS = 2000
_MAX_DETAILED = 50  # older rounds keep only their result
_MAX_FAILURES = 10_000
_MAX_REJECTIONS = 30
_CENTURY_S = 3.2e9


# The events of a round that change nothing else in its view.
_OfRound = (
    run_events.Closed | run_events.Duplicate | run_events.Outlier | run_events.Overweight
    | run_events.Stalled
)  # fmt: skip


class RunView:
    """A run, folded from its events or its history.

    Args:
        only: keep this round only; None keeps the latest 2000.
        whole: keep every round, with all details.

    Attributes:
        run: the run's id; None while unknown.
        planned: the number of rounds that the run is to have.
        phase: ``standby``, ``waiting``, ``open``, ``committing`` or ``ended``.
        rounds: the rounds by number.
        before: round 0: what happened before the first round.
        workers: all known workers.
        rejections: the latest rejected messages, as (time, open round or 0, event).
        causes: the number of rejected messages by cause.
        counters: the counters for Prometheus, across runs.
        waiting: what the coordinator last reported to wait for, and when.
        ended: when and how the run ended.
        unlinked_since: when the coordinator lost the broker; None while it is connected.
    """

    def __init__(self, only: int | None = None, *, whole: bool = False) -> None:
        self._only, self._most = only, math.inf if whole else _MAX_ROUNDS
        self.whole = whole
        self.run: str | None = None
        self.planned: int | None = None
        self.phase = "waiting"
        self.rounds: dict[int, RoundView] = {}
        self.before = RoundView(0)
        self.workers = Workers()
        self.counters = Counters()
        self.causes: Counter[str] = Counter()
        self.rejections: deque[tuple[float, int, run_events.Rejected]] = deque(
            maxlen=None if whole else _MAX_REJECTIONS
        )
        self.waiting: tuple[float, run_events.Waiting] | None = None
        self.ended: tuple[float, RunEvent] | None = None
        self.unlinked_since: float | None = None
        self._blocked_since: float | None = None
        self._open: dict[int, RoundView] = {}

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Apply an event.

        Args:
            at: when it happened.
            event: the event.
            run: the run that it belongs to, for events that do not name it.
        """
        run = getattr(event, "run", None) or run
        if run and run != self.run:
            self._begin(run)
        self.phase = _PHASE_AFTER.get(type(event), self.phase)
        self.workers.add(at, event)
        self.counters.add(at, event)
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, at, event)

    def remember(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Apply the rows of a history (``read_history``); they do not change ``counters``."""
        rows = sorted(rows, key=lambda row: row["round"])
        for row in rows:
            number = row["round"]
            if self._round(number):
                view = self.rounds[number] = remembered(row)
                for name in view.asked:
                    self.workers.remember(name)
                for answer in view.answers.values():
                    worker = self.workers.remember(answer.worker)
                    worker.count(answer.num_examples, answer.bytes, answer.train_s)
        for number, name in late_updates(rows):
            self.workers.remember(name).late += 1
            if number in self.rounds:
                self.rounds[number].came_late.add(name)
        for row in rows:  # last, because a rejected message counts only for a known worker
            view = self.rounds.get(row["round"], self.before)
            for fields in row.get("rejections", ()):
                event = from_fields(run_events.Rejected.name, fields)
                self.workers.add(view.committed_at or 0.0, event)
                self._reject(view.committed_at or 0.0, view.number, event)
        if not self.whole:
            for number in sorted(self.rounds)[:-_MAX_DETAILED]:
                self.rounds[number].drop_details()

    def _reject(self, at: float, during: int, event: RunEvent) -> None:
        if isinstance(event, run_events.Rejected):
            self.causes[cause_of(event)] += 1
            self.rejections.append((at, during, event))

    @property
    def done(self) -> list[RoundView]:
        """The rounds that have a result, in order."""
        return [self.rounds[n] for n in sorted(self.rounds) if self.rounds[n].is_done]

    @property
    def detailed(self) -> list[RoundView]:
        """The latest rounds that have a result, which still have all details."""
        return self.done if self.whole else self.done[-_MAX_DETAILED:]

    @property
    def open(self) -> RoundView | None:
        """The open round; None if there is none."""
        return next(reversed(self._open.values()), None)

    @property
    def committed(self) -> int:
        """The number of the last committed round; 0 if there is none."""
        committed = (n for n, view in self.rounds.items() if view.committed_at is not None)
        return max(committed, default=0)

    @property
    def next(self) -> int:
        """The number after that of the last round with a result."""
        return max((n for n, view in self.rounds.items() if view.is_done), default=0) + 1

    def _begin(self, run: str) -> None:
        if self.run is not None:
            self.rounds, self._open, self.planned = {}, {}, None
            self.causes.clear()
            self.rejections.clear()
            self.workers.begin_run()
        self.run = run

    # --- workers -------------------------------------------------------------------------------

    def _joined(self, at: float, event: run_events.Joined) -> None:
        worker = event.worker or ""
        self.before.failures.pop(worker, None)
        for view in self._open.values():
            view.failures.pop(worker, None)  # a restarted worker gets the work again
            view.rejections.pop(worker, None)
            if worker not in view.asked:
                view.joined[worker] = at

    def _departed(self, _: float, event: Departure) -> None:
        worker = event.worker or ""
        for view in (self._open if self._only is None else self.rounds).values():
            view.joined.pop(worker, None)

    # --- the run -------------------------------------------------------------------------------

    def _started(self, at: float, event: run_events.Started | run_events.Resumed) -> None:
        """Apply the start of a coordinator, which does not know any worker yet."""
        self.planned = event.rounds or self.planned
        committed = event.round if isinstance(event, run_events.Resumed) else 0
        for number, view in self.rounds.items():
            if view.is_open or (committed is not None and number > committed):
                view.restart(at)
        self.workers.begin_coordinator()
        self.waiting = self.ended = self.unlinked_since = self._blocked_since = None

    def _connected(self, at: float, _: RunEvent) -> None:
        self._postpone_deadlines(self.unlinked_since, at)
        self.unlinked_since = None

    def _blocked(self, at: float, _: RunEvent) -> None:
        self._blocked_since = at if self._blocked_since is None else self._blocked_since

    def _unblocked(self, at: float, _: RunEvent) -> None:
        self._postpone_deadlines(self._blocked_since, at)
        self._blocked_since = None

    def _postpone_deadlines(self, since: float | None, at: float) -> None:
        for view in self._open.values():
            if view.deadline_at is not None and since is not None:
                view.deadline_at += max(at - since, 0.0)

    def _disconnected(self, at: float, event: RunEvent) -> None:
        self._unblocked(at, event)
        if self.unlinked_since is None:
            self.unlinked_since = at

    def _waiting(self, at: float, event: run_events.Waiting) -> None:
        self.waiting = (at, event)

    def _ended(self, at: float, event: RunEvent) -> None:
        self.ended, self.waiting = (at, event), None

    # --- rounds --------------------------------------------------------------------------------

    def _opened(self, at: float, event: run_events.Opened) -> None:
        self.waiting = None
        if view := self._round(event.round):
            self._open.pop(view.number, None)  # so that _ask puts it last
            view.open(at)
            self._ask(view, at, event)

    def _reopened(self, at: float, event: run_events.Reopened) -> None:
        if view := self._round(event.round):
            view.note(at, event)
            view.opened_at = view.opened_at or at
            self._ask(view, at, event)

    def _ask(
        self, view: RoundView, at: float, event: run_events.Opened | run_events.Reopened
    ) -> None:
        view.asked, view.needed, view.asked_at = event.asked or (), event.needed, at
        view.failures, view.rejections, view.joined = {}, {}, {}
        view.deadline_at = None
        if event.deadline_s is not None and 0 <= event.deadline_s < _CENTURY_S:
            view.deadline_at = at + event.deadline_s
        if view.is_open:
            self._open[view.number] = view

    def _counted(self, at: float, event: run_events.Counted) -> None:
        worker = event.worker or ""
        if view := self._round(event.round):
            after_s = None if view.asked_at is None else max(0.0, at - view.asked_at)
            view.answers[view.answer_key(worker, event.updates or 0)] = Answer(
                worker,
                at,
                event.num_examples,
                event.train_s,
                event.bytes,
                after_s,
                staleness=getattr(event, "staleness", None),
                weight=getattr(event, "weight", None),
            )
            view.failures.pop(worker, None)
            view.rejections.pop(worker, None)
            view.needed = event.needed or view.needed

    def _quorum(self, at: float, event: run_events.Quorum) -> None:
        if view := self._known(event.round):
            view.note(at, event)
            view.needed = event.needed or view.needed

    def _failure(self, at: float, event: run_events.Failure) -> None:
        if view := self._known(event.round):
            view.note(at, event)
            if len(view.failures) < _MAX_FAILURES:
                view.failures[event.worker or ""] = event.reason or ""

    def _privacy(self, _: float, event: run_events.Privacy) -> None:
        if view := self._round(event.round):
            view.epsilon = event.epsilon

    def _committed(self, at: float, event: run_events.Committed) -> None:
        self.waiting = None
        if view := self._round(event.round):
            view.committed_at = at
            view.participants = event.participants or ()
            view.num_examples = event.num_examples
            view.timings = event.timings or {}
            self._open.pop(view.number, None)
        if self._only is None:
            for number in sorted(self.rounds)[-_MAX_DETAILED - 2 : -_MAX_DETAILED]:
                self.rounds[number].drop_details()

    def _evaluated(self, _: float, event: run_events.Evaluated) -> None:
        if view := self._round(event.round):
            view.loss, view.metrics = event.loss, {**view.metrics, **(event.metrics or {})}
            view.evaluated_on, view.evaluated = event.num_examples, True

    def _personal(self, _: float, event: run_events.Personal) -> None:
        if view := self._round(event.round):
            view.metrics = {**view.metrics, **(event.metrics or {})}

    def _tested(self, _: float, event: run_events.Tested) -> None:
        if view := self._round(event.round):
            view.metrics = {**view.metrics, **add_test_prefix(event.metrics or {})}

    def _noted(self, at: float, event: _OfRound) -> None:
        if view := self._known(event.round):
            view.note(at, event)

    def _late(self, at: float, event: run_events.Late) -> None:
        if view := self._known(event.round):
            view.note(at, event)
            view.came_late.add(event.worker or "")
        if self.rounds:
            (self.open or self.rounds[max(self.rounds)]).late += 1

    def _rejected(self, at: float, event: run_events.Rejected) -> None:
        current = self.open
        if current is not None:
            current.rejected += 1
        self._reject(at, current.number if current else 0, event)
        self._noted_in_open(at, event)
        view = current if event.round is None else self._known(event.round)
        of_update = event.worker and event.kind in (None, "update")
        if view is not None and of_update and len(view.rejections) < _MAX_FAILURES:
            view.rejections[event.worker or ""] = Note(at, event)

    def _noted_in_open(self, at: float, event: RunEvent) -> None:
        """Note an event in its own round, if it names one, and in every open round."""
        views = dict(self._open)
        if view := self._known(getattr(event, "round", None)):
            views[view.number] = view
        if not self.rounds:
            views[0] = self.before
        for view in views.values():
            view.note(at, event)

    # --- the rounds that are kept --------------------------------------------------------------

    def _round(self, number: int | None) -> RoundView | None:
        """Return the round of this number, new if it is unknown; None if it is not kept."""
        if number is None or self._only not in (None, number):
            return None
        if number not in self.rounds and len(self.rounds) >= self._most:
            oldest = min(self.rounds)
            del self.rounds[oldest]
            self._open.pop(oldest, None)
        return self.rounds.setdefault(number, RoundView(number))

    def _known(self, number: int | None) -> RoundView | None:
        """Return the round of this number if it is known or is ``only``; None otherwise."""
        if number == 0:
            return self.before
        return self._round(number) if number in self.rounds or number == self._only else None


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
_HANDLERS: dict[type[RunEvent], Callable[[RunView, float, Any], None]] = {
    run_events.Joined: RunView._joined,
    run_events.Left: RunView._departed,
    run_events.Gone: RunView._departed,
    run_events.Started: RunView._started,
    run_events.Resumed: RunView._started,
    run_events.Connected: RunView._connected,
    run_events.Reconnected: RunView._connected,
    run_events.Disconnected: RunView._disconnected,
    run_events.Blocked: RunView._blocked,
    run_events.Unblocked: RunView._unblocked,
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
    run_events.Personal: RunView._personal,
    run_events.Privacy: RunView._privacy,
    run_events.Tested: RunView._tested,
    run_events.Late: RunView._late,
    run_events.Rejected: RunView._rejected,
    **dict.fromkeys(get_args(_OfRound), RunView._noted),
    **dict.fromkeys(
        (run_events.Refused, run_events.Resend, run_events.FrozenDiffers), RunView._noted_in_open
    ),
}
